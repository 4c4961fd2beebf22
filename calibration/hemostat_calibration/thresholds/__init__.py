"""Robustness thresholds: where a figure leaves its noise floor and where it breaks, with intervals by request."""
