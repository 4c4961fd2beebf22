from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.records import Truth, log_softmax, make_record, truths

from hemostat_calibration.errors import InvalidRecordError
from hemostat_calibration.record_checks import InvalidReason, validate, with_distances
from hemostat_calibration.records import Candidates, ExactDistances, Features, Shift


def good():
    rng = np.random.default_rng(1)
    z = rng.normal(size=(5, 12))
    return make_record(Truth(log_softmax(z), log_softmax(z + 0.3), np.array([0, 1, 2, 3, 4])), 4)


def put(values, index, value):
    changed = values.copy()
    changed[index] = value
    return changed


def candidates(record, **changes):
    return replace(record, compressed=replace(record.compressed, **changes))


def listed(record, **changes):
    return replace(record, reference=replace(record.reference, **changes))


def far(record, **changes):
    exact_distances = ExactDistances(np.zeros(5), np.zeros(5), np.ones(5, np.bool_))
    return replace(record, distances={"identity": replace(exact_distances, **changes)})


def constrained(record, support, **changes):
    return replace(record, **{"support": np.full(5, support, np.int32), "constraint": "grammar"} | changes)


def test_distances_are_checked_where_they_are_added():
    """A model that gives no distribution at a token is infinitely far from the reference."""
    record, distances = good(), ExactDistances(np.array([0.1, np.inf, 0, 0, -1e-4]), np.ones(5), np.zeros(5, np.bool_))
    assert validate(with_distances(record, {"v": distances})).distances == {"v": distances}
    with pytest.raises(InvalidRecordError, match=r"distances\[v\].tv"):
        with_distances(record, {"v": replace(distances, tv=np.full(5, 2.0))})


@given(truths(), st.integers(2, 30), st.sampled_from([None, 1, 3]))
def test_what_models_say_is_accepted(truth, k, reference_k):
    record = make_record(truth, k, reference_k=reference_k)
    assert validate(record) is record


BREAKS = {
    "schema": lambda r: replace(r, schema=2),
    "no tokens": lambda r: replace(r, output_ids=np.zeros(0, np.int32)),
    "id dtype": lambda r: replace(r, output_ids=r.output_ids.astype(np.int64)),
    "float dtype": lambda r: replace(r, reference_at=r.reference_at.astype(np.float32)),
    "emitted outside": lambda r: replace(r, output_ids=put(r.output_ids, 0, 12)),
    "emitted negative": lambda r: replace(r, output_ids=put(r.output_ids, 0, -1)),
    "candidate outside": lambda r: candidates(r, ids=put(r.compressed.ids, (0, 0), 12)),
    "candidate twice": lambda r: candidates(r, ids=put(r.compressed.ids, (0, 1), r.compressed.ids[0, 0])),
    "no candidate": lambda r: candidates(
        r, ids=put(r.compressed.ids, 0, -1), logprobs=put(r.compressed.logprobs, 0, -np.inf)
    ),
    "padding with a value": lambda r: candidates(r, ids=put(r.compressed.ids, (0, 3), -1)),
    "padding before ids": lambda r: candidates(
        r,
        ids=put(put(r.compressed.ids, (0, 2), -1), (0, 3), 11 if 11 not in r.compressed.ids[0] else 10),
        logprobs=put(put(r.compressed.logprobs, (0, 2), -np.inf), (0, 3), -np.inf),
    ),
    "rows": lambda r: replace(r, compressed=Candidates(r.compressed.ids[1:], r.compressed.logprobs[1:])),
    "columns": lambda r: replace(r, reference_at=r.reference_at[:, 1:]),
    "one dimension": lambda r: replace(r, reference_at=r.reference_at[:, 0]),
    "short emitted": lambda r: replace(r, compressed_emitted=r.compressed_emitted[1:]),
    "NaN": lambda r: candidates(r, logprobs=put(r.compressed.logprobs, (0, 3), np.nan)),
    "NaN emitted": lambda r: replace(r, reference_emitted=put(r.reference_emitted, 0, np.nan)),
    "emitted without a probability": lambda r: replace(r, compressed_emitted=put(r.compressed_emitted, 0, -np.inf)),
    "drawn without a probability": lambda r: replace(r, drawn_emitted=put(r.compressed_emitted, 0, -np.inf)),
    "drawn from above 0": lambda r: replace(r, drawn_emitted=put(r.compressed_emitted, 0, 0.1)),
    "short drawn": lambda r: replace(r, drawn_emitted=r.compressed_emitted[1:]),
    "above 0": lambda r: replace(r, reference_emitted=put(r.reference_emitted, 0, 0.1)),
    "reference above 0": lambda r: replace(r, reference_at=put(r.reference_at, (0, 0), 0.1)),
    "unordered": lambda r: candidates(r, logprobs=r.compressed.logprobs[:, ::-1].copy()),
    "reference mass": lambda r: replace(r, reference_at=np.where(r.compressed.ids >= 0, -0.1, np.nan)),
    "reference mass of both lists": lambda r: replace(
        listed(
            r,
            ids=np.argsort(np.isin(np.arange(12), r.compressed.ids[0]))[None, :4].repeat(5, 0).astype(np.int32),
            logprobs=np.log(np.tile([0.4, 0.3, 0.2, 0.09], (5, 1))),
        ),
        compressed=Candidates(r.compressed.ids[:1].repeat(5, 0), r.compressed.logprobs),
    ),
    "reference without mass": lambda r: listed(r, logprobs=np.full_like(r.reference.logprobs, -20.0)),
    "reference of another size": lambda r: replace(r, reference_emitted=put(r.reference_emitted, 0, -1e308)),
    "reference's value of another size": lambda r: replace(r, reference_at=put(r.reference_at, (0, 3), -1e308)),
    "reference list of another size": lambda r: listed(r, logprobs=put(r.reference.logprobs, (0, -1), -1e308)),
    "candidate of another size": lambda r: candidates(r, logprobs=put(r.compressed.logprobs, (0, 3), -1e5)),
    "mass": lambda r: candidates(r, logprobs=np.where(r.compressed.ids >= 0, -0.5, -np.inf)),
    "negative entropy": lambda r: replace(r, reference_entropy=put(r.reference_entropy, 0, -1.0)),
    "large entropy": lambda r: replace(r, reference_entropy=put(r.reference_entropy, 0, 3.0)),
    "fewer than asked for": lambda r: replace(
        candidates(
            r,
            ids=put(r.compressed.ids, (0, slice(2, None)), -1),
            logprobs=put(r.compressed.logprobs, (0, slice(2, None)), -np.inf),
        ),
        reference_at=put(r.reference_at, (0, slice(2, None)), np.nan),
    ),
    "one id for a token": lambda r: replace(
        candidates(r, ids=r.compressed.ids[:, :1], logprobs=r.compressed.logprobs[:, :1]),
        reference_at=r.reference_at[:, :1],
    ),
    "NaN of a reference that knows all": lambda r: replace(r, reference_at=put(r.reference_at, (0, 0), np.nan)),
    "two values of the emitted": lambda r: replace(r, compressed_emitted=r.compressed_emitted - 0.5),
    "two values of the emitted under the reference": lambda r: replace(r, reference_emitted=r.reference_emitted - 0.5),
    "reference of fewer positions": lambda r: replace(
        r, reference=Candidates(r.reference.ids[:-1], r.reference.logprobs[:-1])
    ),
    "reference values of fewer positions": lambda r: replace(r, reference_at=r.reference_at[:-1]),
    "reference of fewer emitted": lambda r: replace(r, reference_emitted=r.reference_emitted[:-1]),
    "reference NaN": lambda r: listed(r, logprobs=put(r.reference.logprobs, (1, 1), np.nan)),
    "reference list above 0": lambda r: listed(r, logprobs=put(r.reference.logprobs, (0, 0), 0.1)),
    "reference unordered": lambda r: listed(r, logprobs=r.reference.logprobs[:, ::-1].copy()),
    "reference twice": lambda r: listed(r, ids=put(r.reference.ids, (0, 1), r.reference.ids[0, 0])),
    "reference outside": lambda r: listed(r, ids=put(r.reference.ids, (0, 0), 12)),
    "distances of NaN": lambda r: far(r, kl=np.full(5, np.nan)),
    "total variation of NaN": lambda r: far(r, tv=np.full(5, np.nan)),
    "negative distance": lambda r: far(r, kl=np.full(5, -0.1)),
    "total variation above 1": lambda r: far(r, tv=np.full(5, 1.1)),
    "total variation below 0": lambda r: far(r, tv=np.full(5, -1e-9)),
    "short distances": lambda r: far(r, kl=np.zeros(4)),
    "short top 1": lambda r: far(r, top1=np.zeros(4, np.bool_)),
    "distances of float32": lambda r: far(r, tv=np.zeros(5, np.float32)),
    "top 1 as numbers": lambda r: far(r, top1=np.zeros(5)),
    "infinite shift": lambda r: replace(r, shifts={"v": Shift(np.full(5, np.inf), np.zeros(5))}),
    "features' name": lambda r: replace(r, features=Features("anchors", np.zeros((5, 3), np.float32))),
    "features' dtype": lambda r: replace(r, features=Features("0" * 32, np.zeros((5, 3)))),
    "short features": lambda r: replace(r, features=Features("0" * 32, np.zeros((4, 3), np.float32))),
    "no features": lambda r: replace(r, features=Features("0" * 32, np.zeros((5, 0), np.float32))),
    "NaN in a row of features": lambda r: replace(
        r, features=Features("0" * 32, put(np.zeros((5, 3), np.float32), (0, 0), np.nan))
    ),
    "infinite features": lambda r: replace(r, features=Features("0" * 32, np.full((5, 3), np.inf, np.float32))),
    "NaN hidden": lambda r: replace(r, reference_hidden=put(np.zeros((5, 3), np.float32), (0, 0), np.nan)),
    "infinite hidden": lambda r: replace(r, reference_hidden=np.full((5, 3), -np.inf, np.float32)),
    "flat hidden": lambda r: replace(r, reference_hidden=np.zeros(5, np.float32)),
    "short code": lambda r: replace(r, shifts={"v": Shift(np.zeros(5), np.zeros(5), np.zeros((4, 2)))}),
    "single code": lambda r: replace(r, shifts={"v": Shift(np.zeros(5), np.zeros(5), np.zeros((5, 2), np.float32))}),  # type: ignore[arg-type]
    "infinite code": lambda r: replace(r, shifts={"v": Shift(np.zeros(5), np.zeros(5), np.full((5, 2), np.nan))}),
    "support without a constraint": lambda r: replace(r, support=np.full(5, 12, np.int32)),
    "a constraint without support": lambda r: replace(r, constraint="grammar"),
    "unknown constraint": lambda r: constrained(r, 12, constraint="mood"),
    "support of the wrong type": lambda r: replace(constrained(r, 12), support=np.full(5, 12)),
    "short support": lambda r: replace(constrained(r, 12), support=np.full(4, 12, np.int32)),
    "support of nothing": lambda r: constrained(r, 0),
    "support beyond the vocabulary": lambda r: constrained(r, 13),
    "more ids than the support": lambda r: constrained(r, 3),
    "entropy above the support's": lambda r: replace(constrained(r, 12), reference_entropy=np.full(5, np.log(12) + 1)),
    "short shift": lambda r: replace(r, shifts={"v": Shift(np.zeros(5), np.zeros(4))}),
}


@pytest.mark.parametrize("name", BREAKS)
def test_every_break_is_named(name):
    record = BREAKS[name](good())
    with pytest.raises(InvalidRecordError) as error:
        validate(record)
    assert error.value.reason in set(InvalidReason)
    assert "\n" not in str(error.value)


def test_the_reasons_are_all_used():
    reasons = set()
    for change in BREAKS.values():
        with pytest.raises(InvalidRecordError) as error:
            validate(change(good()))
        reasons.add(error.value.reason)
    assert reasons == set(InvalidReason)


def test_unknown_is_allowed_where_it_means_unknown():
    record = good()
    validate(replace(record, reference_at=np.full_like(record.reference_at, np.nan), reference_entropy=None))
    validate(replace(record, shifts={"v": Shift(np.full(5, np.nan), np.full(5, np.nan))}))
    values = put(np.zeros((5, 3), np.float32), 2, np.nan)
    validate(replace(record, features=Features("0" * 32, values), reference_hidden=np.ones((5, 7), np.float32)))
