"""Texts as clients send them: other prompt ids are found exactly, and other defaults of sampling by the excess."""

from __future__ import annotations

import numpy as np
import pytest

from hemostat_calibration import state_codec
from hemostat_calibration.arrays import Floats
from hemostat_calibration.canary_texts import TextBaseline, TextComparison, TextReplay, excess
from hemostat_calibration.errors import InvalidArgumentError

IDS = (np.arange(3, dtype=np.int32), np.arange(5, dtype=np.int32))
VOCABULARY, TOP = 2_000, 20


class Model:
    """A model whose next-token distributions are as peaked and as long-tailed as a language model's are."""

    def __init__(self, seed: int = 0, contexts: int = 300) -> None:
        self.rng = np.random.default_rng(seed)
        scales = self.rng.uniform(1.5, 5.0, (contexts, 1))
        logits = self.rng.standard_normal((contexts, VOCABULARY)) * scales
        self.p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        self.tops = [np.sort(np.log(row))[-TOP:] for row in self.p]

    def answers(self, tokens: int, temperature: float = 1.0, top_p: float = 1.0) -> Floats:
        values = []
        for context in self.rng.integers(0, len(self.p), tokens).tolist():
            row = self.p[context] ** (1.0 / temperature)
            order = np.argsort(-row)
            kept = np.cumsum(row[order]) / row.sum() - row[order] / row.sum() < top_p
            row = np.where(np.isin(np.arange(VOCABULARY), order[kept]), row, 0.0)
            token = self.rng.choice(VOCABULARY, p=row / row.sum())
            values.append(excess(float(np.log(self.p[context, token])), self.tops[context]))
        return np.array(values)

    def compared(self, baseline: Floats, now: Floats) -> TextComparison:
        return TextBaseline(("a", "b"), TextReplay(IDS, baseline)).compare(TextReplay(IDS, now))


def test_the_excess_has_a_mean_of_zero_at_temperature_one_if_all_tokens_are_listed() -> None:
    model = Model()
    model.tops = [np.log(row) for row in model.p]
    values = model.answers(4_000)
    assert abs(values.mean()) < 4.0 * values.std() / np.sqrt(len(values))


@pytest.mark.parametrize("defaults", [{}, {"temperature": 0.7}, {"top_p": 0.9}])
def test_no_two_replays_in_a_row_of_an_unchanged_server_differ(defaults: dict[str, float]) -> None:
    model, single = Model(), 0
    pool = model.answers(8_000, **defaults)
    for _ in range(3_500):
        then = model.rng.choice(pool, 1_024)
        first, second = (model.compared(then, model.rng.choice(pool, 256)) for _ in range(2))
        single += first.changed + second.changed
        assert not second.confirms(first)
    assert single <= 7


@pytest.mark.parametrize(
    "defaults", [{"temperature": 0.6}, {"temperature": 1.5}, {"top_p": 0.7}, {"temperature": 0.6, "top_p": 0.95}]
)
def test_other_defaults_of_sampling_are_found_and_named(defaults: dict[str, float]) -> None:
    model = Model()
    then = model.answers(1_024)
    first, second = (model.compared(then, model.answers(256, **defaults)) for _ in range(2))
    assert second.confirms(first)
    assert "a default of temperature, top-p or penalties has changed" in second.summary
    assert not second.other_ids


def test_other_ids_are_exact_and_confirmed_by_other_ids_alone() -> None:
    model = Model()
    then, now = model.answers(100), model.answers(100)
    baseline = TextBaseline(("a", "b"), TextReplay(IDS, then))
    other = baseline.compare(TextReplay((IDS[0], IDS[1][:-1]), now))
    assert other.changed
    assert other.summary.startswith("1 of 2 texts have other token ids: the chat template or the tokenizer has changed")
    assert other.confirms(other)
    assert not baseline.compare(TextReplay(IDS, now)).confirms(other)
    assert not baseline.compare(TextReplay(IDS, np.empty(0))).changed


def test_a_baseline_is_read_as_it_was_written_and_refused_where_it_does_not_fit() -> None:
    baseline = TextBaseline(("a", "b"), TextReplay(IDS, np.zeros(3)))
    read = state_codec.decode(TextBaseline, state_codec.encode(baseline, 1), 1)
    assert read.texts == ("a", "b")
    assert not read.compare(baseline.taken).changed
    with pytest.raises(InvalidArgumentError, match="1 texts have no token ids"):
        TextBaseline(("a",), baseline.taken)
