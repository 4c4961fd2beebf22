"""The laboratory: whatever opens whole checkpoints, and the demo.

It imports parts of `hemostat`, which never imports the laboratory.
"""

__version__ = "0.3.0.dev0"
