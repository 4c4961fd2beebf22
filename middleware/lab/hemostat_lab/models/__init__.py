"""Models on this machine: checkpoint folders, and models of transformers that are loaded one layer at a time.

    checkpoint_folders  folders that this package writes: complete or absent
    checkpoint          a checkpoint folder, read tensor by tensor and dequantized
    skeleton            a model without weights; its layers are loaded one at a time
    activations, walk   texts through the layers: inputs, hidden states and gradients
    second_moments      statistics of those, layer by layer
    copies              a whole model with dense weights, and adapters on top of it
    training            training towards the reference's predictions
    piecewise           a model that reads texts piece by piece

The modules that import torch are loaded by the command line and child processes only.
"""
