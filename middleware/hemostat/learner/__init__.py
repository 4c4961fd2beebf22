"""The contextual learner, in a process of its own: its numpy computations would block the control process's event loop.

`client` is the control process's end, `record_queue` what waits to be sent, `process` the learner, `wire` their
messages; `embedding` reads the output embedding.
"""
