"""Adapters that compensate the weights' error of a compressed checkpoint: made from both checkpoints, layer by layer.

    checkpoint   a checkpoint folder, read tensor by tensor and dequantized
    skeleton     a model without weights; its layers are loaded one at a time
    pair         the reference and the compressed checkpoint: checks, scales that were moved between layers, differences
    activations  texts through the layers: statistics of the inputs, and of the gradients at the outputs
    build        the adapter, and the report on it
    held_out     what it wins back on held-out texts, layer by layer
    copies       a whole model with dense weights, and adapters on top of it
    worker       `build` in a process of its own, from a job folder

torch is imported by these modules; only the command line and child processes load them.
"""
