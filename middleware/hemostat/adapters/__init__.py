"""Adapters (LoRA) that compensate the weights' error of a compressed checkpoint, from making them to serving them.

building    offline: an adapter from both checkpoints and texts
live        in the control process: texts of the traffic, the child process that makes an adapter, the judge
serving     adapters at the engines: loaded, acknowledged and probed
distances   exact distances between two models' predictions, for `building` and the judge
"""
