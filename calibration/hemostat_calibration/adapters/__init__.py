"""Adapters: low-rank corrections of the weights' error, in the metric of the layers' inputs and of the loss.

correction  the best correction b @ a of rank r of a weight's error
factors     the two factors of a layer's correction, and such matrices as int8
gram        second moments of a layer's inputs, or of the gradients at its outputs
"""
