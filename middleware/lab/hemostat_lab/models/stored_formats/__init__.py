"""How the weights of quantized checkpoints are stored, and what they are: a module for each family of formats.

A family reads one layer at a time: the tensors of one weight become the weight, in float32. `reading.py` holds the
table of families by `quant_method`.
"""
