"""The contextual learner, in a process of its own: its numpy computations would block the control process's event loop.

`client` is the control process's end, `process` the learner, `wire` their messages, `embedding` reads the output
embedding.
"""
