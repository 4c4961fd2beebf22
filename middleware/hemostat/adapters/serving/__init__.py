"""Adapters at the engines: loaded, acknowledged and probed at an engine before any request to it asks for one.

`hosts` has a `host` for each engine, which is a part of it. A host decides what is loaded and what may be asked for,
by what the others find: `slots` (how many fit), `server` (the calls), `loading` (the two ways to the engine), `probing`
(the requests of the two probes) and `verdicts` (what their numbers say).

    check     what `hemostat check` says about adapters at the upstream
    host      `AdapterHost`: loads adapters at one engine, and says which of them requests to it may ask for
    hosts     `AdapterHosts`: adapters at every engine
    loading   loads adapters through Hemostat's general plugin or from a shared folder, and unloads them
    probes    which probes have passed since the server's last start, and the next one that is due
    probing   the requests of the two probes
    server    what Hemostat asks of a vLLM server about adapters
    setting   how vLLM has to be started to serve adapters, and what a refusal says about how it was started
    slots     how many adapters fit at the engines, by what their ranks report: pure
    verdicts  what the numbers of the two probes say
    versions  the states of each version of an adapter at one engine, since the engine's last start
"""
