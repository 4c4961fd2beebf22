"""The laboratory: whatever opens whole checkpoints, and the demo.

It imports parts of `hemostat`, which never imports the laboratory.

    adapters     an adapter from the reference and the compressed checkpoint of one model, and texts
    commands     the commands of the laboratory
    compression  compressed copies of checkpoints
    demo         `hemostat demo`: all of Hemostat on one machine, with real models and real prompts
    doctor       `hemostat doctor`: the offline report on a compressed model and its reference
    models       models on this machine
"""

__version__ = "0.3.0.dev0"
