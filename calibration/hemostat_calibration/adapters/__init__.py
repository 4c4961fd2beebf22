"""Adapters: low-rank corrections of the weights' error, in the metric of the layers' inputs and of the loss.

correction  the best correction b @ a of rank r of a weight's error
factors     the two factors of a layer's correction
gram        second moments of a layer's inputs, or of the gradients at its outputs
int8        matrices as int8 with a scale for each row: half the bytes of bfloat16
"""
