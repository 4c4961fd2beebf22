"""`hemostat demo`: all of Hemostat on one machine, with real models and real prompts.

options.py     the flags and their checks
programs.py    vLLM and `hemostat serve`
prompts.py   the prompts, and generated ones
traffic.py     the clients
view.py        the live view and the report
runner.py      starts, waits, stops

Further modules:

    checkpoints    the demo's checkpoints
    result         the result as a page: what it cost, what was recovered, what to do next
    token_classes  the loss by class of token, from the records
    vllm_server    a vLLM server as a child process, for the demo and the tests
"""
