"""`calibration.apply: request`: profiles as sampling parameters."""

from __future__ import annotations

import numpy as np
import pytest
from tests.support.oracle import shift
from tests.support.profile_bench import LEARNED, MODEL, Bench
from tests.support.records import Truth, log_softmax, make_record
from tests.support.world import V

from hemostat.profiles.request_parameters import MAX_LOGIT_BIAS_ENTRIES, as_request
from hemostat_calibration.errors import InvalidProfileError
from hemostat_calibration.profiles.profile import temperature_bias


@pytest.mark.parametrize("default_temperature_is_one", [False, True])
def test_only_what_a_request_can_carry_is_tested(default_temperature_is_one: bool) -> None:
    vocabulary = 2 * MAX_LOGIT_BIAS_ENTRIES
    bench = Bench(known=False, default_temperature_is_one=default_temperature_is_one, apply="request", mode="auto")
    bench.profiles.set_model_pair(MODEL, vocabulary)
    warm = temperature_bias(MODEL, vocabulary, 1.1, np.zeros(vocabulary), 1.0)
    if not default_temperature_is_one:
        with pytest.raises(InvalidProfileError, match=r"temperature 1\.1"):
            bench.profiles.operator.import_profile(warm)
    rng = np.random.default_rng(0)
    off = rng.normal(size=vocabulary)
    for key in LEARNED[:40]:
        z = rng.normal(size=(40, vocabulary))
        truth = Truth(log_softmax(z), log_softmax(0.8 * z + off), rng.integers(0, vocabulary, 40))
        bench.observe(make_record(truth, vocabulary, key=key))
    candidates = [bench.profiles.catalogue.get(v) for v in bench.profiles.trials.tested_versions]
    assert len(candidates) == (2 if default_temperature_is_one else 1)
    for profile in candidates:
        assert profile is not None
        assert 0 < np.count_nonzero(profile.parameters["bias"]) <= MAX_LOGIT_BIAS_ENTRIES
    bench.profiles.operator.promote(bench.profiles.trials.tested_versions[0])
    sent = bench.profiles.request_parameters()
    assert bench.profiles.request_parameters() is sent, "they are not computed again for every policy"
    assert len(sent["request_logit_bias"]) <= MAX_LOGIT_BIAS_ENTRIES
    assert Bench().profiles.request_parameters() == {}


def test_request_parameters_change_logits_as_the_profile_does() -> None:
    bias = np.zeros(V)
    bias[[3, 7]] = 0.5, -0.25
    profile = temperature_bias(MODEL, V, 0.8, bias, 20.0)
    sent = as_request(profile)
    z = np.random.default_rng(0).normal(size=V)
    ours = z.copy()
    for token, value in sent["request_logit_bias"].items():
        ours[int(token)] += value
    ours /= sent["request_temperature"]
    np.testing.assert_allclose(log_softmax(ours), log_softmax(z + shift(profile, z)), atol=1e-4)


def test_a_temperature_of_one_is_not_sent() -> None:
    assert as_request(temperature_bias(MODEL, V, 1.0, np.zeros(V), 1.0)) == {
        "request_temperature": None,
        "request_logit_bias": {},
    }
