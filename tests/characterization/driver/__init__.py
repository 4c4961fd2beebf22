"""The only package of these tests that imports the product or constructs any of its objects.

When modules move or constructors change, its files are edited, and the tests and the golden files stay as they are.
"""

from .life import Life, every_decision
from .pipeline import Clock, K, Pipeline, Relay, alarm_shape, pipeline, policy_of, stored, with_sorted_sets
from .profiles import BIASED, contextual, harmful, helpful, keys, learners_probe, partial, reading, tempered

__all__ = [
    "BIASED",
    "Clock",
    "K",
    "Life",
    "Pipeline",
    "Relay",
    "alarm_shape",
    "contextual",
    "every_decision",
    "harmful",
    "helpful",
    "keys",
    "learners_probe",
    "partial",
    "pipeline",
    "policy_of",
    "reading",
    "stored",
    "tempered",
    "with_sorted_sets",
]
