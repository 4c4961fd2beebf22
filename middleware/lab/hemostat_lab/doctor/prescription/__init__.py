"""The prescription: bits, group size and sparsity of each layer within a budget of bytes, and what they cost in KL."""
