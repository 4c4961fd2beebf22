"""Variants of one template are alike: they are one observation, and are either learned from or judged by.

300 templates with 24 variants, which differ in 3 of 60 places and are each a conversation of its own, behind one system
prompt, in any order. A profile knows by heart what it has learned from: it gains 0.054 on variants of a template of
which it has seen one, and loses 0.039 on all others. Clusters and split are those of production.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from tests.bench.guard import Row, count_row, median
from tests.bench.guard.traffic import WIDTH, Unit, draw_clients, promotions

from hemostat_calibration.arrays import Ids
from hemostat_calibration.guard.guard import Guard
from hemostat_calibration.statistics.split import held_out
from hemostat_calibration.statistics.templates import TemplateTable

NAME = "templates"
TAKES = "5 minutes on one core (a twenty-fifth of the lives)"
TEST_LIVES = 2

TEST = "candidate"
HELD_OUT = 0.3
LEARNED_GAIN, NEW_GAIN = 0.054, -0.039
TEMPLATES, VARIANTS, LENGTH, PLACES, FRAME = 300, 24, 60, 3, 50
VOCABULARY = 40_000

Key = Callable[[int, Ids, bytes], bytes]
"""(number, prompt, conversation) of a request -> what it is split and counted by."""


def rows(lives: int, seed: int) -> Iterator[Row]:
    lives = max(lives // 25, 2)
    leaked, by_conversation, helps, units = 0, 0, 0, []
    for life in range(lives):
        rng = np.random.default_rng([seed, 33, life])
        prompts = traffic(rng)
        by_template = Clusters(rng)
        at_unit = promoted(rng, prompts, by_template, learns_by_heart=True)
        leaked += at_unit is not None
        by_conversation += promoted(rng, prompts, lambda _, __, talk: talk, learns_by_heart=True) is not None
        proof = promoted(rng, prompts, Clusters(rng), learns_by_heart=False)
        helps += proof is not None
        units.append(proof or np.inf)
    words = f"{TEMPLATES} templates with {VARIANTS} variants, +0.054 where learned, -0.039 elsewhere"
    yield count_row(f"{words}: promoted", leaked, lives, 0.05)
    yield Row(
        "the same, split and counted by conversation: promoted",
        f"{by_conversation} of {lives}",
        "for comparison: the rule before",
        True,
    )
    yield Row(
        "the same templates, a profile that gains 0.15 on all: proven",
        f"{helps} of {lives}, median {median(units):g} templates",
        f">= {0.9 * lives:g} of {lives}",
        helps >= 0.9 * lives,
    )


def traffic(rng: np.random.Generator) -> list[tuple[int, Ids]]:
    """The number of the template and the prompt of each request."""
    frame = rng.integers(0, VOCABULARY, FRAME)
    bases = rng.integers(0, VOCABULARY, (TEMPLATES, LENGTH))
    places = [rng.choice(LENGTH, PLACES, replace=False) for _ in range(TEMPLATES)]
    order = rng.permutation(np.repeat(np.arange(TEMPLATES), VARIANTS))
    result = []
    for template in order.tolist():
        text = bases[template].copy()
        text[places[template]] = rng.integers(0, VOCABULARY, PLACES)
        result.append((template, np.concatenate([frame, text]).astype(np.int32)))
    return result


class Clusters:
    """By template, with a restart in the middle."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._key = rng.bytes(32)
        self._table = TemplateTable(self._key)

    def __call__(self, number: int, prompt: Ids, conversation: bytes) -> bytes:
        if number == TEMPLATES * VARIANTS // 2:
            self._table = TemplateTable.load(self._table.save(), self._key)
        return self._table.assign(prompt, conversation)


def promoted(
    rng: np.random.Generator, prompts: list[tuple[int, Ids]], key: Key, *, learns_by_heart: bool
) -> int | None:
    """The units of the proof; None without one."""
    guard = Guard()
    guard.begin_candidate(TEST, {"A": (WIDTH, 1.0)})
    clients, known, stream = draw_clients(rng, len(prompts)), set[int](), []
    for number, (template, prompt) in enumerate(prompts):
        unit = key(number, prompt, number.to_bytes(16, "big"))
        if not held_out(unit, HELD_OUT):
            known.add(template)
            continue
        mean = (LEARNED_GAIN if template in known else NEW_GAIN) if learns_by_heart else 0.15
        gain = float(np.clip(rng.normal(mean, 0.05), -WIDTH, WIDTH))
        stream.append(Unit("A", unit, clients[number], gain))
    return promotions(guard, TEST, stream).get("A")
