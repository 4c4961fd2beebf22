"""Adapters at the engines: loaded, acknowledged and probed at an engine before any request to it asks for one.

`hosts` has a `host` for each address. A host decides what is loaded and what may be asked for, by what the others
find: `slots` (how many fit), `server` (the calls), `folder` (the shared folder), `probing` (the requests of the two
probes) and `verdicts` (what their numbers say).

    check     what `hemostat check` says about adapters at the upstream
    folder    the shared folder from which engines without Hemostat's general plugin load adapters
    host      `AdapterHost`: loads adapters at one engine, and says which of them requests to it may ask for
    hosts     `AdapterHosts`: adapters at every engine
    probes    which probes have passed since the server's last start, and the next one that is due
    probing   the requests of the two probes
    server    what Hemostat asks of a vLLM server about adapters
    setting   how vLLM has to be started to serve adapters, and what a refusal says about how it was started
    slots     how many adapters fit at the engines, by what their ranks report: pure
    verdicts  what the numbers of the two probes say
    versions  the states of each version of an adapter at one engine, since the engine's last start
"""
