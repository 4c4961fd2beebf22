"""Hemostat's pure core: arrays in, arrays out. No IO, no clock, no randomness of its own."""

__version__ = "0.3.0.dev0"
