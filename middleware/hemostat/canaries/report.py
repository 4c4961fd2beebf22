"""The output of canaries: statements, the report of the admin port, and metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hemostat.canaries.engine import (
    BASELINE,
    ENGINES,
    PREFIX,
    SHORT,
    TEXTS,
    WEIGHTS,
    prefix_statement,
    short_statement,
    text_statement,
)
from hemostat.canaries.judge import Judge, figures
from hemostat.canaries.states import CanaryStates, Sets
from hemostat.canaries.weights import Weights
from hemostat.metrics import names
from hemostat.metrics.samples import Sample


class CanaryReport:
    """Reads what the other parts own, and owns nothing."""

    def __init__(self, states: CanaryStates, sets: Sets, judge: Judge, weights: Weights) -> None:
        self._states = states
        self._sets = sets
        self._judge = judge
        self._weights = weights

    def statements(self) -> Iterator[tuple[str, float]]:
        """Yields what is wrong now, one line each, and since when (Unix time)."""
        for canaries, model, reading in self._states.replayed():
            taken = self._sets.of(model)
            if taken is not None and reading.since:
                yield self._judge.statement(canaries, model, reading, taken), min(reading.since.values())
        for name, canaries in self._states.current.items():
            if canaries.texts.since is not None:
                yield text_statement(name, canaries.now.model, canaries.texts), canaries.texts.since
            if canaries.short.since is not None:
                yield short_statement(name, canaries.now.model, canaries.short), canaries.short.since
            if BASELINE in canaries.prefix.since:
                yield prefix_statement(name, canaries.now.model, canaries.prefix), canaries.prefix.since[BASELINE]
            if (stated := self._weights.stated.get(name)) is not None:
                yield self._weights.statement(name), stated.since

    def report(self, problem: str) -> dict[str, Any]:
        """Returns the state of the canaries, JSON-ready.

        problem: the reason why nothing is replayed; "" if something is. set: what is replayed; None before one was
        taken; decoded: the engines decode its answers; replays and until: the number of replays of its baseline, and
        when the last one was. failures: why an engine is not compared. engines: the last replay of each model of each
        engine. distance_nats: the median distance of its sequences. cause: the cause of what was found there, in words.
        texts: by engine, what the last replay of texts as clients send them says. short: the same of the last replay of
        all short sequences, which is made where single ones are suspicious; empty before the set of them was taken.
        prefix: the same of the last replay of sequences behind a prefix that is in the engine's prefix cache.
        weights: the same of the last checksums of its weights.
        """
        base = self._sets.base
        return {
            "detail": problem or ("" if base is not None else "no set was taken yet"),
            "set": None
            if base is None
            else {
                "model": base.origin.model,
                "root": base.origin.root,
                "vllm": base.origin.version,
                "weights": base.origin.weights,
                "engine": base.origin.engine,
                "taken": base.origin.at,
                "sequences": len(base.canaries),
                "tokens": base.tokens,
                "decoded": base.decoded,
                "replays": len(base.baseline),
                "until": base.conditions[-1].at if base.conditions else base.origin.at,
            },
            "failures": {
                name: text
                for name, engine in self._states.current.items()
                if (text := engine.failure or engine.differs)
            },
            "engines": [
                {
                    "engine": canaries.name,
                    "model": model,
                    "at": reading.at,
                    "since": min(reading.since.values(), default=None),
                    "changed": BASELINE in reading.since,
                    "outlier": ENGINES in reading.since,
                    "cause": None if (cause := self._judge.cause(canaries, model, reading)) is None else cause.text,
                    **figures(reading),
                }
                for canaries, model, reading in self._states.replayed()
            ],
            "texts": {
                name: {"since": texts.since, "detail": texts.found.summary}
                for name, canaries in self._states.current.items()
                if (texts := canaries.texts).found is not None
            },
            "short": {
                name: {
                    "since": canaries.short.since,
                    "detail": found.summary if (found := canaries.short.found) else "no sequence was suspicious",
                }
                for name, canaries in self._states.current.items()
                if self._sets.short is not None
            },
            "weights": {
                name: {"since": None if stated is None else stated.since, "detail": detail}
                for name, detail in self._weights.details.items()
                if name in self._states.current
                for stated in [self._weights.stated.get(name)]
            },
            "prefix": {
                name: {
                    "since": prefix.since.get(BASELINE),
                    "detail": prefix.found[BASELINE].summary,
                    "tokens": self._sets.prefix.canaries[0].cached,
                }
                for name, canaries in self._states.current.items()
                if BASELINE in (prefix := canaries.prefix).found and self._sets.prefix is not None
            },
        }

    def samples(self) -> Iterator[Sample]:
        for outcome, count in self._judge.outcomes.items():
            yield Sample(names.CANARY_REPLAYS, (outcome,), count)
        for canaries, model, reading in self._states.replayed():
            cause = self._judge.cause(canaries, model, reading)
            for against, comparison in reading.found.items():
                labels = (canaries.name, model, against)
                yield Sample(names.CANARY_DISTANCE_NATS, labels, comparison.nats)
                found = "" if cause is None or against not in reading.since else cause.cause.value
                yield Sample(names.CANARY_CHANGED, (*labels, found), float(against in reading.since))
        for name, canaries in self._states.current.items():
            if canaries.texts.found is not None:
                labels = (name, canaries.now.model, TEXTS)
                yield Sample(names.CANARY_CHANGED, (*labels, ""), float(canaries.texts.since is not None))
            if self._sets.short is not None:
                labels = (name, canaries.now.model, SHORT)
                yield Sample(names.CANARY_CHANGED, (*labels, ""), float(canaries.short.since is not None))
            if name in self._weights.details:
                labels = (name, canaries.now.model, WEIGHTS)
                yield Sample(names.CANARY_CHANGED, (*labels, ""), float(name in self._weights.stated))
            if BASELINE in canaries.prefix.found:
                labels = (name, canaries.now.model, PREFIX)
                yield Sample(names.CANARY_CHANGED, (*labels, ""), float(BASELINE in canaries.prefix.since))
