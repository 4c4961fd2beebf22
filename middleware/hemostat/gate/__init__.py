"""The gate: may a candidate replace what serves? Prompts are asked of both, and what follows is a verdict.

asked      the prompts of a file, and which of them are asked in which order
endpoint   one vLLM server as the gate asks it: prompt ids, answers, scores of given tokens
folders    starts a vLLM server with the checkpoint of a folder
served     asks a prompt as a client does, and judges the answer
outcomes   the questions about what clients get, each with its margin
unit       measures one prompt: the excess of each question
run        asks prompt after prompt until there is a verdict
state      the evidence so far in a file, so that a rerun goes on with it
summary    the verdict in words, as JSON and as a page
live       the gate on live traffic, in the control process
"""
