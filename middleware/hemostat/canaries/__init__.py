"""Canaries: the same token sequences on every engine again; `control` hourly, `hemostat canaries` by hand.

client    canaries at one vLLM server: takes a set of them, and replays it
engine    one engine's canaries: which models it serves, and what its last replays say
keeper    the canaries of the engines behind the relays
pace      decides when the next sequence may be sent to an engine
prompts   the prompts of canaries
sets      the sets of canaries that are in force, and in the store
variants  the same tokens on an engine in variants, for the cause of a change
"""
