"""Compares what clients get of both models: errors, JSON, tool calls, loops, lengths, default parameters and times.
Each is a question with a margin of its own.

Distances alone would reward a candidate that repeats itself, and do not see what the servers do with a request that
names no temperature. So each prompt is also asked as a client asks it (`served`), and both answers are compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from hemostat.gate.asked import Prompt
from hemostat_calibration.gate.verdict import MIN_UNITS, Question

ERRORS, JSON, TOOL_CALLS, LOOPS, CUT = "errors", "json", "tool_calls", "loops", "cut"
OF_A_FAILURE = frozenset({ERRORS, JSON, TOOL_CALLS})
"""The outcomes that are bad if a request failed: its client got neither an answer, nor JSON, nor a call."""


@dataclass(frozen=True, slots=True)
class Served:
    """An answer as a client gets it.

    bad: the names of what is bad about it. tokens: the number of its tokens. surplus: the mean over its tokens of 1 if
    the likeliest one was taken, less its probability; the expectation is 0 at temperature 1 without truncation. It is
    None if it is not known, or if the tokens are restricted. first_seconds, token_seconds: the time to the first token,
    and of each further one; None if they were not measured.
    """

    bad: frozenset[str]
    tokens: int = 0
    surplus: float | None = None
    first_seconds: float | None = None
    token_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """A question about what clients get.

    text: as in `Question`. margin: the default, of all prompts; None: the question is asked only if the operator gives
    one. min_units: as in `Question`; more where equal models often differ in a single prompt. of: D, None if it is not
    known. applies: to which prompts; None: to all.
    """

    text: str
    margin: float | None
    min_units: int
    of: Callable[[Served, Served], float | None]
    applies: Callable[[Prompt], bool] | None = None


def _bad(name: str) -> Callable[[Served, Served], float | None]:
    return lambda stable, candidate: float(name in candidate.bad) - float(name in stable.bad)


def _relative(before: float | None, now: float | None) -> float | None:
    """Returns by how much `now` is more, as a share of the larger one."""
    if before is None or now is None:
        return None
    return (now - before) / max(now, before) if max(now, before) > 0.0 else 0.0


def _sharper(stable: Served, candidate: Served) -> float | None:
    if stable.surplus is None or candidate.surplus is None:
        return None
    return min(max(candidate.surplus - stable.surplus, -1.0), 1.0)


def _less(difference: Callable[[Served, Served], float | None]) -> Callable[[Served, Served], float | None]:
    """Returns the opposite question."""

    def opposite(stable: Served, candidate: Served) -> float | None:
        value = difference(stable, candidate)
        return None if value is None else -value

    return opposite


def _longer(stable: Served, candidate: Served) -> float | None:
    return _relative(stable.tokens, candidate.tokens) if stable.tokens and candidate.tokens else 0.0


def _free(prompt: Prompt) -> bool:
    return not prompt.response_format


DEFAULTS = "by its server's default parameters (temperature, top-p, top-k, penalties): where a request names none, "
OUTCOMES: Mapping[str, Outcome] = {
    ERRORS: Outcome("worse in its answers: more of them are errors or empty", 0.05, MIN_UNITS, _bad(ERRORS)),
    LOOPS: Outcome("worse in its answers: more of them end in a repetition", 0.05, 100, _bad(LOOPS)),
    CUT: Outcome("worse in its answers: more of them are cut off at the length limit", 0.15, 200, _bad(CUT)),
    "longer": Outcome("longer in its answers, as a share of the longer answer", 0.25, 100, _longer),
    "shorter": Outcome("shorter in its answers, as a share of the longer answer", 0.25, 100, _less(_longer)),
    "sharper": Outcome(
        f"less random {DEFAULTS}it takes the likeliest token more often", 0.05, MIN_UNITS, _sharper, _free
    ),
    "flatter": Outcome(
        f"more random {DEFAULTS}it takes the likeliest token less often", 0.05, MIN_UNITS, _less(_sharper), _free
    ),
    JSON: Outcome(
        "worse in JSON: more of its answers are not what response_format asks for",
        0.1,
        50,
        _bad(JSON),
        lambda prompt: bool(prompt.response_format),
    ),
    TOOL_CALLS: Outcome(
        "worse in tool calls: more of its answers have no call that fits the tools",
        0.1,
        50,
        _bad(TOOL_CALLS),
        lambda prompt: bool(prompt.tools),
    ),
    "first_token": Outcome(
        "slower to its first token, as a share of the longer time",
        None,
        100,
        lambda stable, candidate: _relative(stable.first_seconds, candidate.first_seconds),
    ),
    "token_time": Outcome(
        "slower in each further token, as a share of the longer time",
        None,
        100,
        lambda stable, candidate: _relative(stable.token_seconds, candidate.token_seconds),
    ),
}
TIMES = frozenset({"first_token", "token_time"})
KIND_MARGIN = 0.15
"""The margin in a kind, unless the margin of all prompts is larger."""


class Outcomes:
    """The questions that are asked. margins: by name, in place of the defaults."""

    def __init__(self, margins: Mapping[str, float]) -> None:
        asked = {name: margins.get(name, outcome.margin) for name, outcome in OUTCOMES.items()}
        self.margins = {name: margin for name, margin in asked.items() if margin is not None}
        """The margins of all questions that may be asked, by name."""
        self.timed = bool(TIMES & set(self.margins))
        """It is True if times are measured."""

    def planned(
        self, prompts: Iterable[Prompt], known: Iterable[tuple[str, Collection[str]]]
    ) -> dict[str, Counter[str]]:
        """Returns how many units of each kind ask a question, for each question that does not apply to all prompts and
        is asked at all. prompts: those that will be asked. known: the kind and the questions of each unit so far."""
        result = {name: Counter[str]() for name in self.margins if OUTCOMES[name].applies is not None}
        for kind, names in known:
            for name in result.keys() & set(names):
                result[name][kind] += 1
        for prompt in prompts:
            for name, counts in result.items():
                counts[prompt.kind] += _applies(name, prompt)
        return {name: counts for name, counts in result.items() if counts.total()}

    def questions(self, partly: Collection[str]) -> list[Question]:
        """Returns the questions. partly: the names of those that some prompts ask, and others do not."""
        return [
            Question(
                name,
                OUTCOMES[name].text,
                self.margins[name],
                max(self.margins[name], KIND_MARGIN),
                OUTCOMES[name].min_units,
            )
            for name in self.margins
            if OUTCOMES[name].applies is None or name in partly
        ]

    def excess(self, prompt: Prompt, stable: Served, candidate: Served) -> dict[str, float]:
        """Returns D by question."""
        values = {name: OUTCOMES[name].of(stable, candidate) for name in self.margins if _applies(name, prompt)}
        return {
            name: 0.0 if value is None else value
            for name, value in values.items()
            if value is not None or OUTCOMES[name].applies is None
        }

    def of_a_failure(self, prompt: Prompt, sign: float) -> dict[str, float]:
        """Returns D where one model failed. sign: 1 if it was the candidate, −1 if it was the stable model."""
        failed, other = Served(OF_A_FAILURE), Served(frozenset())
        return self.excess(prompt, *((other, failed) if sign > 0 else (failed, other)))


def _applies(name: str, prompt: Prompt) -> bool:
    applies = OUTCOMES[name].applies
    return applies is None or applies(prompt)
