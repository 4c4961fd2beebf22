"""The adapters' benchmark: its arithmetic on numbers that can be counted by hand, and what it keeps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.bench.recovery.adapters import kinds, pareto, plan, texts
from tests.bench.recovery.adapters.run import labelled
from tests.bench.recovery.adapters.scores import Scorer, Tokens, distances, hidden_states
from tests.bench.recovery.adapters.served import agreement, compare
from tests.bench.recovery.adapters.shrink import Region, shrunk_figures
from tests.bench.recovery.engine import Ask, Written
from tests.bench.recovery.stages import Stages
from tests.support.constant_profile import constant_profile

from hemostat_calibration.adapters.factors import LowRank

V, D = 12, 4


class SmallCopy:
    """A "decoder" whose state at a position is the embedding of its token, or with an adapter that plus b @ a of it."""

    def __init__(self, seed: int) -> None:
        self.embedding = torch.from_numpy(np.random.default_rng(seed).normal(size=(V, D)).astype(np.float32))
        self.change = torch.zeros(D, D)
        self.runs = 0
        self.model: Any = self

    def get_decoder(self) -> Any:
        return self

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        self.runs += 1
        states = self.embedding[input_ids]

        class Output:
            last_hidden_state = states + states @ self.change.T

        return Output

    @contextlib.contextmanager
    def adapted(self, adapter: dict[str, LowRank] | None) -> Iterator[None]:
        self.change = torch.from_numpy(adapter["x"].b @ adapter["x"].a) if adapter else torch.zeros(D, D)
        yield


class SmallCopies:
    def __init__(self) -> None:
        self.reference, self.compressed = SmallCopy(0), SmallCopy(1)


def written(lengths: list[tuple[int, int]]) -> list[Written]:
    rng = np.random.default_rng(5)
    return [
        Written(
            Ask(f"p{n}", 9, 1.0, n, tap=False),
            rng.integers(V, size=p).astype(np.int32),
            rng.integers(V, size=o).astype(np.int32),
            "",
        )
        for n, (p, o) in enumerate(lengths)
    ]


def test_prompts_of_other_kinds_are_distinct_and_enough() -> None:
    result = kinds.by_kind()
    assert len(result["json"]) == kinds.EXTRACTIONS >= 200
    for asked in result.values():
        assert len(set(asked)) == len(asked)


def test_prompts_of_all_kinds_to_learn_from_are_none_of_those_that_are_answered() -> None:
    open_questions = [ask.text for ask in texts.open_asks(heldout=False)]
    result = kinds.to_learn_from(open_questions, plan.FULL.mixed)
    answered = {text for asked in kinds.by_kind().values() for text in asked}
    assert len(set(result)) == len(result) == plan.FULL.mixed >= 40
    assert not answered & set(result)
    first = result[:20]
    for start in ("Extract", "What is", "Write a Python function that"):
        assert sum(text.startswith(start) for text in first) >= 4
    assert sum(text in open_questions for text in first) == 5
    assert not any(f"{name} is" in text for name in texts.prompts.PEOPLE for text in result)


def test_adapters_are_chosen_by_words_of_their_labels() -> None:
    served = plan.FULL.served
    assert labelled(served, []) == list(served)
    assert [v.rank for v in labelled(served, ["rank 64"])] == [64]
    assert [v.mixed for v in labelled(served, ["all kinds", "distilled"])] == [False, True]
    assert len({v.label for v in served}) == len(served)


def test_held_out_topics_are_all_asked_about_and_not_learned_from() -> None:
    heldout = texts.open_asks(heldout=True)[: plan.FULL.texts["w4a16"].heldout]
    learning = texts.open_asks(heldout=False)
    assert all(any(topic in ask.text for ask in heldout) for topic in texts.prompts.HELDOUT_TOPICS)
    assert not {ask.text for ask in heldout} & {ask.text for ask in learning}


def test_states_are_those_before_each_output_token_in_the_order_of_the_texts() -> None:
    some = written([(3, 2), (1, 4), (2, 1)])
    copy = SmallCopy(0)
    states = hidden_states(copy, None, some, "small")
    before = np.concatenate([np.concatenate([t.prompt, t.output])[len(t.prompt) - 1 : -1] for t in some])
    assert np.array_equal(states, copy.embedding.numpy()[before])


def test_distances_are_those_counted_by_hand() -> None:
    r, c = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    kl, reverse, tv, top1 = distances(r.log(), c.log() + 3.0)[:, 0].tolist()
    assert kl == pytest.approx(0.25 * np.log(2.0))
    assert reverse == pytest.approx(0.25 * np.log(2.0))
    assert tv == pytest.approx(0.25)
    assert top1 == 0.0


def test_figures_are_kept_by_adapter_and_an_exact_adapter_leaves_nothing(tmp_path: Path) -> None:
    copies, some = SmallCopies(), written([(3, 6), (2, 5)])
    # With the reference's embedding as the compressed one, but doubled: b a = −½ of the states mends it.
    copies.compressed.embedding = 2.0 * copies.reference.embedding
    weight = np.random.default_rng(2).normal(size=(V, D)).astype(np.float32)
    scorer = Scorer(Stages(tmp_path), ["r", "c"], copies, weight, "small")
    half = {"x": LowRank(-0.5 * np.eye(D, dtype=np.float32), np.eye(D, dtype=np.float32))}
    for _ in range(2):
        figures = scorer.figures(Tokens.of(some), {"without": None, "with": half})
        assert figures["without"].kl.min() > 0.0
        assert figures["with"].kl == pytest.approx(0.0, abs=1e-6)
        assert figures["with"].top1.tolist() == [1.0] * 11
    assert (copies.reference.runs, copies.compressed.runs) == (1, 2)


def test_log_probabilities_are_split_by_text(tmp_path: Path) -> None:
    copies, some = SmallCopies(), written([(3, 6), (2, 5)])
    weight = np.random.default_rng(2).normal(size=(V, D)).astype(np.float32)
    scorer = Scorer(Stages(tmp_path), ["r", "c"], copies, weight, "small")
    states = hidden_states(copies.compressed, None, some, "small")
    result = scorer.logprobs(states, some)
    assert [len(part) for part in result] == [6, 5]
    z = torch.from_numpy(states[6]) @ torch.from_numpy(weight).T
    assert result[1][0] == pytest.approx(float(torch.log_softmax(z, -1)[int(some[1].output[0])]), abs=1e-5)


def test_agreement_sees_an_adapter_that_the_engine_did_not_apply() -> None:
    rng = np.random.default_rng(0)
    plain, effect = rng.normal(size=400), rng.normal(size=400)
    noise = 0.01 * rng.normal(size=(2, 400))
    applied = agreement([plain], [plain + effect], [plain + noise[0]], [plain + effect + noise[1]])
    assert applied["correlation_of_effect"] > 0.99
    assert applied["mean_absolute_difference_with"] < 0.02
    ignored = agreement([plain], [plain + noise[1]], [plain + noise[0]], [plain + effect])
    assert abs(ignored["correlation_of_effect"]) < 0.2
    assert ignored["mean_absolute_difference_with"] > 0.5


def test_outcomes_compare_both_arms_with_the_reference() -> None:
    def arm(json_text: str, answer: str, output: list[int]) -> dict[str, list[Written]]:
        ids = np.array(output, np.int32)
        (template,) = written([(2, 2)])
        made = {
            kind: [Written(template.ask, template.prompt, ids, text)] * 3
            for kind, text in (("json", json_text), ("short", answer), ("arithmetic", answer), ("code", "x"))
        }
        return made

    result = compare(arm('{"a": 1}', "Paris", [1, 2, 3]), arm("{", "paris.", [1, 9, 3]), arm("{}", "Rome", [1, 2, 9]))
    assert (result["json_valid"]["without"], result["json_valid"]["with"], result["json_valid"]["reference"]) == (
        0,
        1,
        1,
    )
    assert (result["short_exact_match"]["without"], result["short_exact_match"]["with"]) == (1, 0)
    assert (result["common_prefix_tokens"]["without"], result["common_prefix_tokens"]["with"]) == (1, 2)


def test_a_shift_is_shrunk_by_its_distance_from_what_was_learned() -> None:
    learned = np.random.default_rng(1).normal(size=(2000, D)).astype(np.float32)
    region = Region.of(learned)
    assert (region.distance(learned) <= region.limit).mean() == pytest.approx(0.95, abs=0.001)
    assert region.limit == pytest.approx(3.08, abs=0.1)  # of the chi distribution with four degrees of freedom
    far = np.full((1, D), 50.0, np.float32)
    assert region.weight(far)[0] == pytest.approx(region.limit / 100.0, rel=0.05)
    weight = np.random.default_rng(2).normal(size=(V, D)).astype(np.float32)
    profile = constant_profile("m", np.linspace(-1.0, 1.0, V), 4.0)
    states = learned[:5]
    none, whole = (shrunk_figures(weight, states, states, profile, np.full(5, f)).kl for f in (0.0, 1.0))
    assert none == pytest.approx(0.0, abs=1e-6)
    assert whole.min() > 0.01


def test_bytes_of_other_roundings_are_parts_of_those_of_w4a16() -> None:
    assert pareto.BASE.bits_per_weight == 4.25
    assert [round(pareto.more_bytes(other), 3) for other in pareto.OTHERS] == [0.059, 0.235, 0.471]
