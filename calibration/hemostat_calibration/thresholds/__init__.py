"""Robustness thresholds: where a figure leaves its noise floor and where it breaks, with intervals by request.

breaks      finds the break of a curve
curve       a figure by setting (bits, sparsity, layers), measured on requests that the settings share; the first
            setting at which a figure is above its noise floor
statements  statements about thresholds and order, tested
"""
