"""The configuration: its sections (`schema`), where values come from (`loading`), and its errors (`errors`).

client_limits      the section `client_limits` of the configuration
control            the section `control` of the configuration
errors             errors of the configuration, explained in one line
fields             the types of the configuration's values, with their checks, and the base of its sections
install_command    the commands that messages give for installing a package
loading            loads the configuration
observability      the sections `log` and `tracing` of the configuration
prompt_lines       files of prompts, which settings and commands name
reasoning_parsers  vLLM's reasoning parsers by name, with the texts that enclose the thinking
reloading          rules for what a changed setting needs in order to take effect in a running instance (SIGHUP)
rendering          settings as a commented YAML file, from which `load` makes the same settings
schema             the sections of the configuration
store_url          addresses of stores (`store.url`)
text               the text of the errors of the configuration
waiting_times      the time that each figure and decision takes at the earliest, by the settings
"""
