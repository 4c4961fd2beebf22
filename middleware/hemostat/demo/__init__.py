"""`hemostat demo`: the whole of Hemostat on one machine, with real models and real prompts.

prompts.py reads prompts, traffic.py sends them, view.py shows what comes of it, runner.py starts and stops everything.
"""

from hemostat.demo.runner import DemoOptions, run

__all__ = ["DemoOptions", "run"]
