"""An adapter served by a real vLLM: do engine and copy agree, what it writes by itself, and what people see of it on
kinds that it has not learned from."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tests.bench.recovery.engine import Ask, Written, engine
from tests.bench.recovery.figures import groups, interval
from tests.bench.recovery.outcomes import (
    common_prefix,
    holds_json_object,
    is_json_object,
    on_policy,
    paired,
    same_answer,
)
from tests.bench.recovery.stages import Stages

from hemostat_calibration.profiles.adapter import adapter_layers, max_rank
from hemostat_calibration.profiles.profile import CalibrationProfile

from .checkpoints import Pair
from .kinds import by_kind
from .scores import Scorer, Tokens, hidden_states
from .texts import MAX_TOKENS, checkpoint_digest, open_asks

GREEDY_TOKENS = 64
OWN_TEXTS = 210
"""Of all held-out topics."""
AGREEMENT_TOKENS = 3_000

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Answers:
    """Of one engine session. greedy, sampled: by kind, in the order of its prompts."""

    greedy: dict[str, list[Written]]
    sampled: dict[str, list[Written]]
    own: list[Written]
    logprobs: list[Floats]


def _asks(temperature: float, tokens: int, number: int) -> dict[str, list[Ask]]:
    return {
        kind: [Ask(text, tokens, temperature, number + n, tap=False) for n, text in enumerate(texts)]
        for kind, texts in by_kind().items()
    }


def answers(
    stages: Stages,
    checkpoint: Path,
    adapter: CalibrationProfile | None,
    own: Sequence[Ask],
    scored: Sequence[Written],
    name: str,
    *,
    sample: bool = False,
) -> Answers:
    """From the engine with the checkpoint, of requests that ask for the adapter, or, None, for none.

    own: prompts to be answered at temperature 1; scored: texts whose log-probabilities are asked for; sample: also
    answer the prompts of other kinds at temperature 1.
    """
    greedy, sampled = _asks(0.0, GREEDY_TOKENS, 0), _asks(1.0, MAX_TOKENS, 3_000_000)

    async def session() -> Answers:
        adapters = [] if adapter is None else [adapter]
        rank = 0 if adapter is None else max_rank(adapter)
        model = "bench" if adapter is None else adapter.version
        async with engine(
            checkpoint, [], stages.folder / f"vllm-{name}.log".replace(" ", "-").replace(",", ""), adapters, rank
        ) as running:
            logprobs = await running.logprobs(scored, model)
            texts = {kind: await running.write(asks, f"{name}, greedy, {kind}", model) for kind, asks in greedy.items()}
            drawn = (
                {kind: await running.write(asks, f"{name}, {kind}", model) for kind, asks in sampled.items()}
                if sample
                else {}
            )
            mine = await running.write(own, f"{name}, own texts", model) if own else []
            return Answers(texts, drawn, mine, logprobs)

    made_from = [
        checkpoint_digest(checkpoint),
        None if adapter is None else adapter.version,
        [asdict(ask) for asks in (*greedy.values(), *sampled.values(), own) for ask in asks],
        Tokens.of(scored).digest,
        sample,
    ]
    return stages.kept("adapter-answers", made_from, lambda: asyncio.run(session()))


def plain_answers(stages: Stages, pair: Pair, heldout: Sequence[Written]) -> Answers:
    """Of the compressed model as it is; its own texts of other kinds are what figures are over."""
    scored = _first(heldout, AGREEMENT_TOKENS)
    return answers(stages, pair.compressed, None, [], scored, f"{pair.scheme}-plain", sample=True)


def served(
    stages: Stages,
    pair: Pair,
    scorer: Scorer,
    adapter: CalibrationProfile,
    heldout: Sequence[Written],
    name: str,
) -> dict[str, Any]:
    """What is said of one adapter at the engine. heldout: empty, only what people see of greedy answers."""
    scored = _first(heldout, AGREEMENT_TOKENS) if heldout else []
    own = open_asks(heldout=True, number=2_000_000)[:OWN_TEXTS] if heldout else []
    reference = answers(stages, pair.reference, None, [], scored[:1], "reference")
    if heldout:
        plain = plain_answers(stages, pair, heldout)
    else:
        plain = answers(stages, pair.compressed, None, [], [], f"{pair.scheme}-greedy")
    treated = answers(stages, pair.compressed, adapter, own, scored, f"{pair.scheme}-treated-{name}")
    result = {"outcomes": compare(reference.greedy, plain.greedy, treated.greedy)}
    if not heldout:
        return result
    layers = adapter_layers(adapter)
    on_heldout = scorer.figures(Tokens.of(heldout), {"without": None})["without"]
    on_own = scorer.figures(Tokens.of(treated.own), {name: layers})[name]
    ours = [_copied(scorer, scored, adapter, name) for adapter in (None, layers)]
    return result | {
        "other_kinds": other_kinds(scorer, plain.sampled, layers, name),
        "agreement": agreement(plain.logprobs, treated.logprobs, *ours),
        "own_texts": on_policy(on_heldout.kl, groups(heldout)[1], on_own.kl, groups(treated.own)[1]),
    }


def _first(texts: Sequence[Written], tokens: int) -> list[Written]:
    total = np.cumsum([len(text.output) for text in texts])
    return list(texts[: int(np.searchsorted(total, tokens)) + 1])


def _copied(scorer: Scorer, texts: Sequence[Written], layers: Any, name: str) -> list[Floats]:
    """Log-probabilities of every text's output by our copy, float64 [T] each."""
    states = hidden_states(scorer.copies.compressed, layers, texts, f"{name}, agreement")
    return scorer.logprobs(states, texts)


def agreement(
    plain: Sequence[Floats], treated: Sequence[Floats], our_plain: Sequence[Floats], our_treated: Sequence[Floats]
) -> dict[str, float]:
    """Of engine and copy on the emitted tokens' log-probabilities, nats: mean |Δ| without and with the adapter, and the
    correlation of what the adapter changes."""
    c, t, oc, ot = (np.concatenate(list(part)) for part in (plain, treated, our_plain, our_treated))
    return {
        "tokens": float(len(c)),
        "mean_difference_without": float(np.mean(c - oc)),
        "mean_difference_with": float(np.mean(t - ot)),
        "mean_absolute_difference_without": float(np.mean(np.abs(c - oc))),
        "mean_absolute_difference_with": float(np.mean(np.abs(t - ot))),
        "mean_absolute_effect": float(np.mean(np.abs(ot - oc))),
        "correlation_of_effect": float(np.corrcoef(t - c, ot - oc)[0, 1]),
    }


Texts = Mapping[str, Sequence[Written]]


def compare(reference: Texts, plain: Texts, treated: Texts) -> dict[str, Any]:
    """What people see of greedy texts, by kind, beside the reference's: both arms and their difference."""

    def score(of: Callable[[Written, Written], float], kinds: Sequence[str], name: str) -> dict[str, Any]:
        arms = [
            [of(r, t) for kind in kinds for r, t in zip(reference[kind], arm[kind], strict=True)]
            for arm in (plain, treated)
        ]
        said = paired(arms[0], arms[1], name)
        said["reference"] = float(np.mean([of(r, r) for kind in kinds for r in reference[kind]]))
        return said

    def exact(r: Written, t: Written) -> float:
        return float(same_answer(r.text, t.text))

    def prefix(r: Written, t: Written) -> float:
        return float(common_prefix(r.output, t.output))

    every = list(reference)
    return {
        "json_valid": score(lambda _, t: float(is_json_object(t.text)), ["json"], "json"),
        "json_inside": score(lambda _, t: float(holds_json_object(t.text)), ["json"], "json inside"),
        "json_exact_match": score(exact, ["json"], "json match"),
        "short_exact_match": score(exact, ["short", "arithmetic"], "short"),
        "common_prefix_tokens": score(prefix, every, "prefix"),
        **{f"common_prefix_tokens_{kind}": score(prefix, [kind], f"prefix {kind}") for kind in every},
    }


def other_kinds(scorer: Scorer, texts: Texts, layers: Any, name: str) -> dict[str, Any]:
    """KL recovered on texts of kinds that nothing was learned from, intervals by prompt."""
    result = {}
    for kind, some in texts.items():
        figures = scorer.figures(Tokens.of(some), {"without": None, name: layers})
        before, after = figures["without"], figures[name]
        prompt = np.repeat(np.arange(len(some)), [len(text.output) for text in some])
        won, low, high = interval(prompt, before.kl - after.kl, before.kl, kind)
        result[kind] = {
            "tokens": len(before.kl),
            "kl_before": float(before.kl.mean()),
            "kl_after": float(after.kl.mean()),
            "kl_won_back": won,
            "ci95": [low, high],
        }
    return result
