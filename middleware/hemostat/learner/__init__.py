"""The contextual learner, in a process of its own: its numpy computations would block the control process's event loop.

`client` is the control process's end, `record_queue` what waits to be sent, `learner_process` the learner,
`learner_messages` what they send each other, and `stored` the learner's statistics in the store.
"""
