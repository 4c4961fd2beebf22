"""A family that only the tests have is proposed, judged, served, stored and applied, with no change elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.support import torch_temperature_bias  # noqa: F401 - the engine can apply the family then
from tests.support.profile_bench import BIASED, JUDGED, MODEL, Bench, contextual
from tests.support.temperature_bias import TEMPERATURE_BIAS, temperature_bias
from tests.support.world import V

from hemostat.profiles.candidates import Candidate, Origin, Proposed
from hemostat_calibration.profiles.families import FAMILIES
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.profiles.transform import shift_at
from hemostat_engine import transform


def unbiased(part: float = 1.0, tokens: int = 1_000) -> CalibrationProfile:
    """Takes back a part of what the biased world adds."""
    return temperature_bias(MODEL, V, 1.0, -part * BIASED.bias, 1.5, {"tokens": str(tokens)})


def test_it_is_proposed_promoted_and_served_again_after_a_restart() -> None:
    bench = Bench()
    profile = unbiased()
    assert bench.profiles.proposals.accepts(TEMPERATURE_BIAS, 1_000)
    assert bench.profiles.proposals.propose(profile, "learned by a test", {"tokens": 1_000})
    assert bench.status()["candidates"][0]["source"] == TEMPERATURE_BIAS
    bench.feed(BIASED, JUDGED, bench.serves)
    assert bench.profiles.serving.selected == profile.version
    shown = bench.profiles.report.describe(profile.version)
    assert shown is not None
    assert (shown["family"], shown["state"], shown["adapter"]) == (TEMPERATURE_BIAS, "selected", None)
    again = bench.restart()
    again.profiles.set_model_pair(MODEL, V)
    assert again.profiles.serving.selected == profile.version
    assert not again.profiles.proposals.accepts(TEMPERATURE_BIAS, 1_999)
    assert again.profiles.proposals.accepts(TEMPERATURE_BIAS, 2_000)


def test_a_stored_profile_of_a_family_that_went_serves_as_identity_with_one_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An upgrade to a version without the family loses no stored profile, and goes on with the other families."""
    bench = Bench()
    profile = unbiased()
    bench.profiles.proposals.propose(profile, "", {"tokens": 1_000})
    bench.feed(BIASED, JUDGED, bench.serves)
    bench.profiles.proposals.propose(unbiased(0.9, 10_000), "", {"tokens": 10_000})
    bench.profiles.writer.save()
    monkeypatch.delitem(FAMILIES, TEMPERATURE_BIAS)
    again = bench.restart(crash=True)
    again.profiles.set_model_pair(MODEL, V)
    assert again.profiles.serving.selected is None
    event = again.last("roll_back")
    assert (event["version"], event["reason"]) == (profile.version, "lost")
    assert "family temperature_bias is unknown" in event["why"]
    assert again.profiles.trials.queue == ()
    assert profile.version in {stored.version for stored in again.store.profiles()}
    assert again.profiles.proposals.propose(contextual(), "", {"tokens": 1_000})
    last = again.restart(crash=True)
    assert last.decisions().count("roll_back") == 1


def test_its_newer_proposal_waits_for_the_older_one_and_it_for_families_that_go_first() -> None:
    bench = Bench()
    first, second, other = unbiased(), unbiased(0.9, 10_000), contextual()
    bench.profiles.proposals.propose(first, "", {"tokens": 1_000})
    bench.feed(BIASED, JUDGED[:1])
    bench.profiles.proposals.propose(second, "", {"tokens": 10_000})
    bench.profiles.proposals.propose(other, "", {"tokens": 1_000})
    assert bench.profiles.trials.tested_versions == [other.version, first.version]
    assert [candidate["version"] for candidate in bench.status()["waiting"]] == [second.version]
    assert Candidate("a", Proposed(TEMPERATURE_BIAS)).priority > Candidate("b", Origin.IMPORT).priority


def test_an_engine_applies_it_as_numpy_does() -> None:
    profile = unbiased()
    logits = torch.log_softmax(torch.randn((3, V), generator=torch.Generator().manual_seed(1)), dim=-1)
    wanted = logits.numpy() + shift_at(profile, np.tile(np.arange(V), (3, 1)), logits.numpy())
    transform.apply_to_rows(
        transform.HeldProfile(profile), logits, None, torch.zeros(2, dtype=torch.int64), on_device=torch.tensor
    )
    assert np.allclose(logits.numpy(), wanted, atol=1e-6)
