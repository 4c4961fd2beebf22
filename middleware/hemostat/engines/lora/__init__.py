"""Adapters at the engines: loaded there, acknowledged by every engine, and probed before any request asks for one.

`host` decides what is loaded and what may be asked for, by what the others find: `slots` (how many fit), `server` (the
calls), `folder` (the shared folder), `probing` (the requests of the two probes) and `verdicts` (what their numbers
say).
"""
