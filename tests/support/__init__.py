"""Shared test code: fakes, builders and harnesses. Tests import from here and never from each other."""
