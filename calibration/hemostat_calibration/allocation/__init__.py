"""What each unit of a model gets out of a budget of bytes: ranks of adapters, bits of layers."""
