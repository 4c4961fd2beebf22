"""Models on this machine: checkpoint folders, and models of transformers that are loaded one layer at a time.

    checkpoint_folders  folders that this package writes: complete or absent
    checkpoint          a checkpoint folder, read tensor by tensor and dequantized
    skeleton            a model without weights; its layers are loaded one at a time
    activations, walk   texts through the layers: inputs, hidden states and gradients
    second_moments      statistics of those, layer by layer
    copies              a whole model with dense weights, and adapters on top of it
    training            training towards the reference's predictions

The modules that import torch are loaded by the command line and child processes only.

Further modules:

    experts         mixtures of experts: each expert as linear layers of its own, and what a router chooses
    generation      texts that a causal language model of transformers generates
    parts           finished parts of a build: tensors under names, on disk or in memory
    processor       what this machine's processor computes well
    quiet           runs transformers without its progress bars and advice
    stored_formats  how the weights of quantized checkpoints are stored, and what they are
    work_folder     the folder of finished parts, from which an interrupted command continues
"""
