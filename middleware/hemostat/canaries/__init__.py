"""Canaries: the same token sequences on every engine again; `control` hourly, `hemostat canaries` by hand.

client    canaries at one vLLM server: takes a set of them, and replays it
endpoint  first tokens of answers of any server with the OpenAI API
engine    one engine's canaries: which models it serves, when it is asked, and what its last replays say
judge     judges replays: how far an engine is from its baseline and from the other engines, and the cause
keeper    the canaries of the engines behind the relays
pace      decides when the next sequence may be sent to an engine
prompts   the prompts of canaries
replay    the requests to an engine: a set is taken, replayed and explained
report    the output of canaries: statements, the report of the admin port, and metrics
schedule  the times at which an engine is asked
short     the short sequences of one engine, every few seconds
states    the states of the canaries of every engine, and the part of them that outlasts the control process
through   the same through a public address, until each engine behind it was seen
texts     the canaries' texts as clients send them: token ids, and free answers
weights   checksums of the engines' weights, tensor by tensor
variants  the same tokens on an engine in variants, for the cause of a change
"""
