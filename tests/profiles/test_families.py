"""Every family of profiles that can be loaded has rules for its life."""

from __future__ import annotations

from tests.support.profile_bench import ANCHORS, contextual, harmful

from hemostat.profiles.families import FAMILY_RULES, anchor_set
from hemostat_calibration.profiles.families import FAMILIES
from hemostat_calibration.profiles.transform import anchors_digest


def test_every_family_has_rules() -> None:
    assert FAMILY_RULES.keys() == FAMILIES.keys()


def test_the_anchor_set_is_empty_for_a_family_that_reads_no_logits() -> None:
    assert anchor_set(contextual()) == anchors_digest(ANCHORS)
    assert anchor_set(harmful()) == ""
