"""The division of a budget of bytes between the units of a model: ranks of adapters, bits of layers.

knapsack  one option for each unit (ranks, bits), with the least sum of losses within a budget of bytes
sparsity  the number of weights that each layer loses within one budget of the whole model
"""
