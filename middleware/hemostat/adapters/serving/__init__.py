"""Adapters at the engines: loaded, acknowledged and probed at an engine before any request to it asks for one.

`hosts` has a `host` for each address. A host decides what is loaded and what may be asked for, by what the others
find: `slots` (how many fit), `server` (the calls), `folder` (the shared folder), `probing` (the requests of the two
probes) and `verdicts` (what their numbers say).
"""
