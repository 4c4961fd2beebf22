"""The hot path: a protocol-level HTTP relay."""
