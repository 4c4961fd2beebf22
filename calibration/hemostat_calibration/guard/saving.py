"""The guard's state as JSON bytes and back (`state_codec`).

Size: of a kind of a candidate's test about 1 kB, 5.4 bytes for each unit counted (at most `MAX_UNITS`) and 120 for each
client (at most `MAX_CLIENTS`); of a kind of a serving profile 220 for each client. 25 kinds that a profile serves, and
that two candidates are tested in: at most 4 MB, and 0.2 MB with 300 units of 20 clients each.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np

from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.guard.harm import MAX_RUNS, HarmSum
from hemostat_calibration.guard.kind_test import DIGEST_BYTES, MAX_UNITS, KindTest
from hemostat_calibration.state_codec import decode as read
from hemostat_calibration.state_codec import encode as written
from hemostat_calibration.statistics.dependence import MAX_CLIENTS, KindDependence

SCHEMA = 5
"""An older one than `OLDEST` is refused, and a newer one."""
OLDEST = 4
"""The oldest schema that is read. Its tests do not say when their gains were: the cycle that these have to span begins
anew.
"""


@dataclass(slots=True)
class State:
    """The state of the guard.

    candidate_tests: the number of candidates' tests begun. windows: the number of windows begun, by kind. tests: name
    -> kind -> test. ended: name -> (number, weight, log e-value) of kinds of a candidate's test that ended before the
    others. dependence: the dependence of noted units, by kind.
    """

    candidate_tests: int = 0
    windows: dict[str, int] = field(default_factory=dict)
    tests: dict[str, dict[str, KindTest]] = field(default_factory=dict)
    ended: dict[str, list[tuple[int, float, float]]] = field(default_factory=dict)
    dependence: dict[str, KindDependence] = field(default_factory=dict)


def encode(state: State) -> bytes:
    """Returns the state as JSON.

    >>> encode(State(candidate_tests=2))
    b'{"schema":5,"state":{"candidate_tests":2,"windows":{},"tests":{},"ended":{},"dependence":{}}}'
    """
    return written(state, SCHEMA)


def decode(data: bytes) -> State:
    """Returns a state that was encoded. Raises InvalidArgumentError if the bytes are not one of this schema, or of
    `OLDEST`.

    >>> decode(encode(State(candidate_tests=2))).candidate_tests
    2
    """
    state = read(State, _upgraded(data), SCHEMA)
    _require(min(state.candidate_tests, *state.windows.values(), 0) >= 0, "a count is below 0")
    for kind, dependence in state.dependence.items():
        _require_like(dependence, KindDependence(), kind)
        _require_rows(dependence.clients, kind)
    for kinds in state.tests.values():
        for kind, test in kinds.items():
            _require_test(test, kind)
    return state


def _upgraded(data: bytes) -> bytes:
    """Returns the bytes in this schema if they are of `OLDEST`; anything else is returned as it is."""
    try:
        stored = json.loads(data)
        if stored["schema"] != OLDEST:
            return data
        for kinds in stored["state"]["tests"].values():
            for test in kinds.values():
                test.update(last=0.0, elapsed=0.0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return data
    return json.dumps(stored | {"schema": SCHEMA}).encode()


def _require_test(test: KindTest, kind: str) -> None:
    _require_like(test, KindTest(test.role, test.width, test.number), kind)
    _require(test.elapsed >= 0.0, f"the time of {kind!r} is below 0")
    _require(min(test.weight, test.token_cap) > 0.0 and test.inherited >= 1.0, f"a number of {kind!r} is too small")
    counts = (test.number - 1, test.window, test.refused, test.units, test.tokens, *(n - 1 for n in test.counts))
    _require(min(counts) >= 0, f"a count of {kind!r} is below 0")
    _require(test.units == test.gain.observations, f"the units of {kind!r} do not belong together")
    _require_rows(test.places, kind, len(test.counts))
    digests = {len(digest) for digest in test.counted} <= {DIGEST_BYTES}
    _require(digests and len(test.counted) <= MAX_UNITS, f"the digests of {kind!r} do not belong together")
    if test.harm is not None:
        _require_rows(test.harm.places, kind)
        _require(len(test.harm.runs) <= MAX_RUNS, f"{kind!r} has too many runs")
        for run in test.harm.runs:
            _require(run.mark.shape == HarmSum(1).wealth.shape, f"the runs of {kind!r} do not belong together")


def _require_rows(rows: Any, kind: str, count: int | None = None) -> None:
    """Requires that each client has a row, and that there is one for each."""
    whole: Collection[int] = range(len(rows) if count is None else count)
    _require(
        len(whole) <= MAX_CLIENTS and sorted(rows.values()) == list(whole), f"the clients of {kind!r} do not match"
    )


def _require_like(stored: Any, fresh: Any, kind: str) -> None:
    """Raises an error unless arrays are finite and have the shapes that an object has which has just begun."""
    for name in (attribute.name for attribute in fields(stored)):
        value, expected = getattr(stored, name), getattr(fresh, name)
        if is_dataclass(value) and is_dataclass(expected):
            _require_like(value, expected, kind)
        elif isinstance(value, np.ndarray):
            same = value.shape == expected.shape and np.isfinite(value).all()
            _require(bool(same), f"{name} of {kind!r} has another shape, or is not finite")
        elif isinstance(value, float):
            _require(not np.isnan(value), f"{name} of {kind!r} is not a number")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InvalidArgumentError(f"the guard's state is damaged: {message[:100]}")
