"""The contextual learner, in a process of its own: numpy at length would hold up the control process's event loop.

client.py is the control process's end, process.py the learner itself, wire.py what they say to each other, embedding.py
reads the output embedding.
"""

from hemostat.learner.client import Learner, Source

__all__ = ["Learner", "Source"]
