"""Simulated worlds of the gate."""
