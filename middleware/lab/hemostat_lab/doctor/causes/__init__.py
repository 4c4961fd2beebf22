"""Why the compressed model differs: which layers, modules, positions and tokens, and which outliers.

distances  the error of each layer's outputs
findings   what the report's figures say about causes, as sentences with their evidence
html       the page's section on causes
layers     which layers and modules cost what
outliers   outliers of weights and activations, and attention sinks
routing    mixtures of experts: which experts both models choose for the same tokens
units      parts of two models that can be exchanged
"""
