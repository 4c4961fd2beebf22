"""Each of several requests has the figures that `divergence` gives for it."""

from dataclasses import fields, replace

import numpy as np
import pytest
from tests.support.records import Truth, log_softmax, make_record
from tests.support.temperature_bias import temperature_bias
from tests.support.work import instructions

from hemostat_calibration.divergence.per_token import divergence
from hemostat_calibration.divergence.together import MAX_TOKENS, divergences
from hemostat_calibration.records import Features, RecoveredDivergence, Sampling, Shift

VOCABULARY = 400
PROFILE = temperature_bias("m", VOCABULARY, 1.1, np.linspace(-0.2, 0.2, VOCABULARY), 0.5)


def truth(rng, tokens, noise=0.8):
    z = 3.0 * rng.normal(size=(tokens, VOCABULARY))
    log_c = log_softmax(z + noise * rng.normal(size=z.shape))
    return Truth(log_softmax(z), log_c, (log_c + rng.gumbel(size=z.shape)).argmax(1))


def mask(rng, made):
    allowed = rng.random(made.compressed.shape) < 0.5
    allowed[:, :30] = True
    allowed[np.arange(len(allowed)), made.emitted] = True
    return allowed


def recovered(record, usable):
    values = np.full(record.tokens, 0.01)
    near = values if usable else values + 1.0
    return replace(record, recovered=RecoveredDivergence(*(np.full(record.tokens, 0.2),) * 5, near / 10.0, near / 10.0))


def unlisted(record):
    """The same where the emitted tokens are in no list, as an engine may answer whose tokens the plugin hands out."""
    ids = np.where(record.compressed.ids == record.output_ids[:, None], -1, record.compressed.ids)
    order = np.argsort(ids < 0, axis=1, kind="stable")
    logprobs = np.where(ids < 0, -np.inf, record.compressed.logprobs)
    at = np.where(ids < 0, np.nan, record.reference_at)
    compressed = replace(
        record.compressed, ids=np.take_along_axis(ids, order, 1), logprobs=np.take_along_axis(logprobs, order, 1)
    )
    return replace(record, compressed=compressed, reference_at=np.take_along_axis(at, order, 1))


def varied(seed):
    """Records, each with its served profile, that differ in all that figures depend on."""
    rng = np.random.default_rng(seed)
    result = []
    for number in range(24):
        made = truth(rng, int(rng.integers(1, 40)), float(rng.choice([0.0, 0.3, 2.0])))
        k = int(rng.choice([2, 8, 20]))
        match number % 8:
            case 0:
                result.append((make_record(made, k), None))
            case 1:
                result.append((make_record(made, k, reference_k=8, chat=True), None))
            case 2:
                result.append((make_record(made, k, mask=mask(rng, made)), None))
            case 3:
                served = rng.choice(["known", "unknown"]) == "known"
                record = make_record(made, k, profile=PROFILE, applied=PROFILE.version, log_normalizer=served)
                result.append((record, PROFILE))
            case 4:
                result.append((make_record(made, k, sampling=Sampling(temperature=0.7)), None))
            case 5:
                result.append((recovered(make_record(made, k), bool(rng.integers(2))), None))
            case 6:
                record = make_record(made, k)
                result.append((replace(record, drawn_emitted=record.compressed_emitted - 0.1), None))
            case _:
                result.append((unlisted(make_record(made, k)), None))
    return result


def arrays(figures):
    for each in fields(figures):
        value = getattr(figures, each.name)
        if isinstance(value, np.ndarray):
            yield each.name, value
        elif each.name == "bounds":
            for name in ("kl_rc", "kl_cr", "js", "tv"):
                interval = getattr(value, name)
                yield from ((f"{name}.lower", interval.lower), (f"{name}.upper", interval.upper))


@pytest.mark.parametrize("seed", range(6))
def test_each_has_the_figures_that_it_has_alone(seed):
    given = varied(seed)
    together = divergences([record for record, _ in given], [profile for _, profile in given])
    for (record, profile), figures in zip(given, together, strict=True):
        alone = divergence(record, profile)
        assert figures.bound == alone.bound
        assert figures.bounds.min_ratio == alone.bounds.min_ratio
        for (name, values), (_, expected) in zip(arrays(figures), arrays(alone), strict=True):
            assert values.dtype == expected.dtype, name
            np.testing.assert_allclose(values, expected, rtol=1e-12, atol=1e-12, err_msg=name)


def test_they_come_in_the_order_of_the_records_whatever_is_computed_with_what():
    rng = np.random.default_rng(1)
    records = [make_record(truth(rng, tokens), k) for tokens, k in ((3, 8), (5, 20), (4, 8), (MAX_TOKENS, 8), (2, 20))]
    assert [len(figures.kl_rc) for figures in divergences(records)] == [3, 5, 4, MAX_TOKENS, 2]
    assert divergences([]) == []


def test_a_request_that_holds_its_whole_vocabulary_makes_no_other_exact():
    rng = np.random.default_rng(2)
    made = truth(rng, 4)
    allowed = np.zeros((4, VOCABULARY), dtype=bool)
    allowed[:, :5] = True
    allowed[np.arange(4), made.emitted] = True
    narrow, wide = make_record(made, 20, mask=allowed), make_record(made, 20, mask=mask(rng, made))
    assert [figures.bound for figures in divergences([wide, narrow, wide])] == ["lower", "exact", "lower"]


def test_codes_and_features_stay_with_their_request():
    """The estimate of each request is weighted by what the engine reported of that request."""
    rng = np.random.default_rng(3)
    records = []
    for _ in range(2):
        record = make_record(truth(rng, 6), 20, profile=PROFILE, applied=PROFILE.version)
        reported = record.shifts[PROFILE.version]
        shift = Shift(reported.expected, reported.log_normalizer, rng.normal(size=(6, 3)))
        features = Features("0" * 32, rng.normal(size=(6, 4)).astype(np.float32))
        records.append(replace(record, shifts={PROFILE.version: shift}, features=features))
    for record, figures in zip(records, divergences(records, [PROFILE, PROFILE]), strict=True):
        assert np.isfinite(figures.estimate_rc).all()
        np.testing.assert_allclose(figures.estimate_rc, divergence(record, PROFILE).estimate_rc, rtol=1e-12)


def test_short_requests_share_the_cost_of_a_call():
    """`make bench-bounds ARGS=--speed-only` has the time."""
    rng = np.random.default_rng(4)
    records = [make_record(truth(rng, 16), 20) for _ in range(16)]
    assert instructions(lambda: divergences(records)) < 0.35 * 16 * instructions(lambda: divergence(records[0]))
