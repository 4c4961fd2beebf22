"""Why the compressed model differs: which layers, modules, positions and tokens, and which outliers."""
