"""Every family of profiles that can be loaded has rules for its life."""

from __future__ import annotations

import numpy as np
from tests.support.profile_bench import ANCHORS, contextual, harmful

from hemostat.profiles.families import FAMILY_RULES, anchor_set
from hemostat_calibration.profiles.contextual import probe_profile
from hemostat_calibration.profiles.families import FAMILIES
from hemostat_calibration.profiles.transform import anchors_digest


def test_every_family_has_rules() -> None:
    assert FAMILY_RULES.keys() == FAMILIES.keys()


def test_the_anchor_set_is_empty_for_a_family_that_reads_no_logits() -> None:
    assert anchor_set(contextual()) == anchors_digest(ANCHORS)
    assert anchor_set(harmful()) == ""


def test_a_limit_of_kl_that_never_binds_is_shown_as_none() -> None:
    probe = probe_profile("m", 4, np.array([1, 3]), clamp_nats=1.0)
    assert FAMILY_RULES[probe.family].kl_limit(probe) is None
