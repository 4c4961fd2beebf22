"""`hemostat demo`: all of Hemostat on one machine, with real models and real prompts.

options.py     the flags and their checks
programs.py    vLLM and `hemostat serve`
prompts.py, generated_prompts.py    the prompts
traffic.py     the clients
view.py        the live view and the report
runner.py      starts, waits, stops
"""
