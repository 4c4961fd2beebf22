"""Adapters (LoRA) that compensate the weights' error of a compressed checkpoint, from the traffic's texts to serving
them. The laboratory makes them (`hemostat_lab.adapters`).

live        in the control process: texts of the traffic, the child process that makes an adapter, the judge
serving     adapters at the engines: loaded, acknowledged and probed
"""
