"""The whole of `hemostat gate` in simulated worlds: all of its questions, in kinds of different sizes.

`python -m tests.bench.gate.whole`: the verdict is the first one of each life, as the command ends at it. There are
three worlds, and the prompts of a life are in random order:

one      one mean that a pass requires, another one in each life, is exactly at its margin, and none is above it: a pass
         is wrong, and a fail, too
all      every mean is as large as a candidate may have it: over all prompts at the margin, and in the smallest kind at
         that kind's margin: a fail is wrong
equal    all means are 0: a pass is right
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hemostat.gate.outcomes import Outcomes
from hemostat.gate.unit import KIND_WEIGHTS, MARGINS, Expect, questions
from hemostat_calibration.gate.verdict import ALL, FRACTIONS, PRIOR, Gate, Outcome
from hemostat_calibration.guard.closing import least_mean

ALPHA = 0.05
KINDS: Mapping[str, float] = {"chat": 0.5, "code": 0.3, "data": 0.15, "rare": 0.05}
"""The part of the prompts that each kind has."""
PROMPTS, BATCH = 1200, 250
FREE = ("sharper", "flatter")
"""Questions that would not apply to prompts with `response_format`. No prompt has one here."""
QUESTIONS = [*questions(Expect.OTHER, MARGINS["other"], 0.15), *Outcomes({}).questions(FREE)]
NAMES = [question.name for question in QUESTIONS]
DISTANCE = 0.1
"""The spread of D around its mean, for both distances."""
BAD: Mapping[str, float] = {"errors": 0.02, "loops": 0.05, "cut": 0.5}
"""The part of the stable model's answers that are bad."""
OPPOSITES: Mapping[str, tuple[str, float]] = {"longer": ("shorter", 0.3), "sharper": ("flatter", 0.15)}
"""Questions of which one is the negative of the other, and the spread of D."""
WORLDS = ("one", "all", "equal")

Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Lives:
    """kinds: the number of the kind of each prompt, [lives, prompts]. excess: D, [lives, prompts, questions]."""

    kinds: Numbers
    excess: Floats


@dataclass(frozen=True)
class Verdicts:
    """The first verdict of each life, "" where none came, and the prompt at which it came."""

    outcomes: npt.NDArray[np.str_]
    prompts: npt.NDArray[np.int64]

    def share(self, outcome: Outcome) -> float:
        return float((self.outcomes == outcome.value).mean())


def planned(prompts: int) -> dict[str, int]:
    return {kind: round(part * prompts) for kind, part in KINDS.items()}


def required(prompts: int) -> list[tuple[int, str]]:
    """Returns the numbers of the questions, and the kinds, of the means that a pass requires."""
    plan = {ALL: prompts, **planned(prompts)}
    return [
        (number, kind)
        for number, question in enumerate(QUESTIONS)
        for kind, count in plan.items()
        if kind == ALL or count >= question.min_units
    ]


def means(world: str, lives: int, prompts: int, random: np.random.Generator) -> Floats:
    """Returns the mean of D in each life, of each kind and question, [lives, kinds, questions]."""
    result = np.zeros((lives, len(KINDS), len(QUESTIONS)))
    parts, kinds = list(KINDS.values()), list(KINDS)
    if world == "one":
        at = required(prompts)
        for life, chosen in enumerate(random.integers(len(at), size=lives)):
            number, kind = at[chosen]
            allowed = QUESTIONS[number].allowed(kind)
            if kind == ALL:
                result[life, :, number] = allowed
            else:  # and 0 over all prompts
                result[life, :, number] = -allowed * KINDS[kind] / (1.0 - KINDS[kind])
                result[life, kinds.index(kind), number] = allowed
    elif world == "all":
        for number, question in enumerate(QUESTIONS):
            others = (question.margin - parts[-1] * question.kind_margin) / (1.0 - parts[-1])
            result[:, :, number] = others
            result[:, -1, number] = question.kind_margin
    for name, (opposite, _) in OPPOSITES.items():
        one, other = NAMES.index(name), NAMES.index(opposite)
        result[:, :, one] -= result[:, :, other] * (result[:, :, one] == 0.0)
        result[:, :, other] = -result[:, :, one]
    return result


def drawn(world: str, lives: int, prompts: int, seed: int) -> Lives:
    random = np.random.default_rng([seed, WORLDS.index(world)])
    plan = np.repeat(np.arange(len(KINDS)), list(planned(prompts).values()))
    kinds = random.permuted(np.tile(plan, (lives, 1)), axis=1)
    mean = np.take_along_axis(means(world, lives, prompts, random), kinds[:, :, None], axis=1)
    excess = np.zeros(mean.shape)
    for number, name in enumerate(NAMES):
        each = mean[:, :, number]
        if name in BAD:
            bad = random.random((2, *each.shape)) < BAD[name] + np.maximum([each, -each], 0.0)
            excess[:, :, number] = bad[0].astype(np.float64) - bad[1]
        elif name in OPPOSITES:
            opposite, spread = OPPOSITES[name]
            excess[:, :, number] = each + spread * random.choice((-1.0, 1.0), each.shape)
            excess[:, :, NAMES.index(opposite)] = -excess[:, :, number]
        elif name in KIND_WEIGHTS:
            excess[:, :, number] = each + DISTANCE * random.choice((-1.0, 1.0), each.shape)
    return Lives(kinds, excess)


def verdicts(lives: Lives) -> Verdicts:
    """Returns the first verdict of all lives at a time, as `Gate` gives them."""
    count, prompts, _ = lives.excess.shape
    kinds = [ALL, *KINDS]
    margins = np.array([[question.allowed(kind) for kind in kinds] for question in QUESTIONS])
    needed, weights = -math.log(ALPHA), _weights()
    has_to_pass = np.zeros(margins.shape, bool)
    for number, kind in required(prompts):
        has_to_pass[number, kinds.index(kind)] = True
    passing, failing = np.zeros((2, count, *margins.shape, len(PRIOR)))
    passed = np.zeros((count, *margins.shape), bool)
    outcomes, at = np.full(count, "", "<U9"), np.full(count, prompts)
    every = np.arange(count)
    for prompt in range(prompts):
        value = lives.excess[:, prompt]
        for column in (np.zeros(count, np.intp), 1 + lives.kinds[:, prompt]):
            margin = margins[:, column].T
            passing[every, :, column] += np.log1p(FRACTIONS * ((margin - value) / (1.0 - margin))[..., None])
            failing[every, :, column] += np.log1p(FRACTIONS * ((value - margin) / (1.0 + margin))[..., None])
        passed |= _mixed(passing) >= needed
        own = _mixed(failing).reshape(count, -1)
        # An adjusted e-value is at most the e-value.
        near = np.flatnonzero((own.max(axis=1) >= needed) & (outcomes == ""))
        failed = [life for life in near.tolist() if _above(own[life].tolist(), weights, needed)]
        ended = (passed | ~has_to_pass).all(axis=(1, 2)) & (outcomes == "")
        ended[failed] = True
        at[ended] = prompt + 1
        outcomes[ended] = Outcome.PASS.value
        outcomes[failed] = Outcome.FAIL.value
    return Verdicts(outcomes, at)


def _above(own: list[float], weights: list[float], needed: float) -> bool:
    best = max(range(len(own)), key=lambda j: own[j])
    return own[best] + math.log(least_mean(own, weights, best)) >= needed


def _weights() -> list[float]:
    """Returns the weights of the closed test: of each question over all prompts, and in each kind."""
    in_kind = [KIND_WEIGHTS.get(name, 1.0) for name in NAMES]
    return [
        0.5 / len(NAMES) if column == 0 else 0.5 * weight / sum(in_kind) / len(KINDS)
        for weight in in_kind
        for column in range(1 + len(KINDS))
    ]


def _mixed(log_k: Floats) -> Floats:
    top = log_k.max(axis=-1)
    result: Floats = top + np.log(np.exp(log_k - top[..., None]) @ PRIOR)
    return result


def life(kinds: Numbers, excess: Floats) -> tuple[str, int]:
    """Returns the verdict of one life by the code that is landed, and the prompt at which it came."""
    plan, names = planned(len(kinds)), list(KINDS)
    gate = Gate(QUESTIONS, plan, ALPHA, dict.fromkeys(FREE, plan), KIND_WEIGHTS)
    for number, (kind, values) in enumerate(zip(kinds.tolist(), excess.tolist(), strict=True), 1):
        gate.update(names[kind], dict(zip(NAMES, values, strict=True)))
        outcome = gate.verdict().outcome
        if outcome is not Outcome.UNDECIDED:
            return outcome.value, number
    return "", len(kinds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lives", type=int, default=2000)
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--only", choices=WORLDS, help="one of the worlds")
    options = parser.parse_args()
    print(f"{len(required(options.prompts))} means have to pass, of {len(NAMES)} questions in {len(KINDS)} kinds")
    for world in WORLDS if options.only is None else (options.only,):
        batches = [
            verdicts(drawn(world, min(BATCH, options.lives - begin), options.prompts, seed=begin))
            for begin in range(0, options.lives, BATCH)
        ]
        outcomes, prompts = (
            np.concatenate([getattr(one, name) for one in batches]) for name in ("outcomes", "prompts")
        )
        found = Verdicts(outcomes, prompts)
        right = np.where(found.outcomes == Outcome.PASS.value, found.prompts, np.inf)
        print(
            f"{world:8}passes {found.share(Outcome.PASS):.4f}, fails {found.share(Outcome.FAIL):.4f}, median until a "
            f"pass {np.median(right):.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
