"""Pruning of linear layers: scores from activations and gradients, masks, and weights that make up for dropped ones.

compensation  the weights that stay take over what the dropped ones did
dense_model   what pruning measures of the dense model: gradients, losses, inputs
method        pruning as a method of compression
rows          whole neurons and heads
weights       one linear layer's weight, pruned, and which of its weights are kept
"""
