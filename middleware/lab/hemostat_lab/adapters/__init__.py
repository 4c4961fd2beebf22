"""An adapter from the reference and the compressed checkpoint of one model, and texts, layer by layer.

    pair           both checkpoints: checks, scales that were moved between layers, differences of the weights
    build          the corrections of all linear layers, the adapter, and the report on it
    held_out       what it recovers on held-out texts, layer by layer
    distil         an adapter that is trained further
    build_process  `build` in a process of its own, from a job folder

torch is imported by these modules; only the command line and child processes load them.

Further modules:

    judge_process  the judge, in a process of its own
    distances      exact distances between two models' predictions
"""
