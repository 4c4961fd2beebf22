"""Pruning of linear layers: scores from activations and gradients, masks, and weights that make up for dropped ones."""
