"""One module for each command of the command line; `arguments` has what they share.

admin_port   commands that talk to the admin port of a running `hemostat serve`
arguments    parts that several commands share: types of arguments, flags of settings, a vLLM server's address
canaries     `hemostat canaries …`: the same token sequences on a vLLM server again, by hand
check        `hemostat check`: validate the configuration and probe both models
control      `hemostat control`: run a control process whose relays are on other machines
engines      `hemostat engines`: the engines that requests go to, and taking one out of service
first_start  parts that `hemostat init` and `hemostat serve` without a file share, such as the engine token
gate         `hemostat gate`: pass, fail or undecided, for a candidate that may replace what serves
init         `hemostat init`: write a configuration file
profile      `hemostat profile …`
relay        `hemostat relay`: run relays whose control process is on another machine
report       `hemostat report`: the figures of captures that were scored later than they were served
score        `hemostat score`: scores the captures of a spool on a reference
serve        `hemostat serve`: run the proxy
setup_check  the probes of `hemostat check`
"""
