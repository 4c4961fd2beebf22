"""The life of a profile asks its family for its anchors, and for the limit that it enforces."""

from __future__ import annotations

import numpy as np
from tests.support.profile_bench import ANCHORS, contextual, harmful

from hemostat_calibration.profiles.contextual import probe_profile
from hemostat_calibration.profiles.transform import anchor_set, anchors_digest


def test_the_anchor_set_is_empty_for_a_family_that_reads_no_logits() -> None:
    assert anchor_set(contextual()) == anchors_digest(ANCHORS)
    assert anchor_set(harmful()) == ""


def test_a_limit_of_kl_that_never_binds_is_shown_as_none() -> None:
    probe = probe_profile("m", 4, np.array([1, 3]), clamp_nats=1.0)
    assert probe.spec.kl_limit(probe.parameters) is None
