"""The division of a budget of bytes between the units of a model: ranks of adapters, bits of layers."""
