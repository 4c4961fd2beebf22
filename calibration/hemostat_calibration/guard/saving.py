"""The guard's state as JSON bytes and back.

Size: of a kind of a candidate's test about 300 bytes, 5.4 for each unit counted (at most `MAX_UNITS`) and 120 for each
client (at most `MAX_CLIENTS`); of a kind of a serving profile 220 for each client. 25 kinds that a profile serves, and
that two candidates are tested in: at most 4 MB, and 0.2 MB with 300 units of 20 clients each.
"""

from __future__ import annotations

import base64
import json
import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.guard.decisions import Figure, Role
from hemostat_calibration.guard.harm import MAX_RUNS, HarmSum, Run
from hemostat_calibration.guard.kind_test import DIGEST_BYTES, MAX_UNITS, KindTest
from hemostat_calibration.guard.wealth import FRACTIONS, Floats
from hemostat_calibration.statistics.dependence import MAX_CLIENTS, BatchMeans, ClientBatches, KindDependence

FORMAT = 3
"""Of the JSON; another one is refused. 2 did not know when units were noted."""


@dataclass(slots=True)
class State:
    """candidate_tests: tests of candidates begun. windows: by kind, windows begun. tests: name -> kind -> test.

    ended: name -> (number, weight, log e-value) of kinds of a candidate's test that ended before the others.
    dependence: by kind.
    """

    candidate_tests: int = 0
    windows: dict[str, int] = field(default_factory=dict)
    tests: dict[str, dict[str, KindTest]] = field(default_factory=dict)
    ended: dict[str, list[tuple[int, float, float]]] = field(default_factory=dict)
    dependence: dict[str, KindDependence] = field(default_factory=dict)


def encode(state: State) -> bytes:
    """The state as JSON.

    >>> encode(State(candidate_tests=2))
    b'{"format":3,"candidate_tests":2,"windows":{},"tests":{},"ended":{},"dependence":{}}'
    """
    return json.dumps(
        {
            "format": FORMAT,
            "candidate_tests": state.candidate_tests,
            "windows": state.windows,
            "tests": {
                name: {kind: _test_json(test) for kind, test in kinds.items()} for name, kinds in state.tests.items()
            },
            "ended": state.ended,
            "dependence": {kind: _dependence_json(found) for kind, found in state.dependence.items()},
        },
        separators=(",", ":"),
    ).encode()


def decode(data: bytes) -> State:
    """A state that was encoded. InvalidArgumentError where the bytes are not one of this format.

    >>> decode(encode(State(candidate_tests=2))).candidate_tests
    2
    """
    try:
        stored = json.loads(data)
        if stored["format"] != FORMAT:
            raise InvalidArgumentError(f"the guard's state has format {str(stored['format'])[:20]}, not {FORMAT}")
        return State(
            candidate_tests=_count(stored["candidate_tests"]),
            windows={kind: _count(number) for kind, number in stored["windows"].items()},
            tests={
                name: {kind: _read_test(test) for kind, test in kinds.items()}
                for name, kinds in stored["tests"].items()
            },
            ended={
                name: [(_count(number), _positive(weight), float(log_e)) for number, weight, log_e in items]
                for name, items in stored["ended"].items()
            },
            dependence={kind: _read_dependence(found) for kind, found in stored["dependence"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InvalidArgumentError):
            raise
        raise InvalidArgumentError(f"the guard's state is damaged: {error}") from None


def _test_json(test: KindTest) -> dict[str, Any]:
    """Without `figure` and `kl_sums` where gains are in nats, as before there was another figure."""
    other = (
        {}
        if test.figure is Figure.NATS
        else {"figure": test.figure.value, "kl_sums": _array_text(test.kl_sums[: test.clients])}
    )
    return {
        "role": test.role.value,
        "width": test.width,
        "number": test.number,
        "weight": test.weight,
        "window": test.window,
        "token_cap": test.token_cap,
        "frozen": test.frozen,
        "supported": test.supported,
        "refused": test.refused,
        "units": test.units,
        "tokens": test.tokens,
        "gain": [test.gain.total, test.gain.squares],
        "places": [client.hex() for client in test.places],
        "counts": test.counts,
        "counted": base64.b64encode(b"".join(test.counted)).decode(),
        "wealth": _array_text(test.wealth[: test.clients]),
        "opposing": _array_text(test.opposing),
        "sums": _array_text(test.sums[: test.clients]),
        **other,
        **_by_role_json(test),
    }


def _by_role_json(test: KindTest) -> dict[str, Any]:
    if (harm := test.harm) is not None:
        return {"inherited": test.inherited, "harm": _harm_json(harm)}
    return {"batches": _batches_json(test.batches)}


def _batches_json(batches: BatchMeans) -> list[Any]:
    return [batches.units, _array_text(batches.open), _array_text(batches.sums)]


def _read_batches(stored: list[Any]) -> BatchMeans:
    units, opened, sums = stored
    empty = BatchMeans.of(1)
    return BatchMeans(_count(units), _read_array(opened, empty.open.shape), _read_array(sums, empty.sums.shape))


def _dependence_json(found: KindDependence) -> dict[str, Any]:
    clients, by_client = len(found.clients), found.by_client
    return {
        "in_time": _batches_json(found.in_time),
        "first": found.first,
        "last": found.last,
        "clients": [client.hex() for client in found.clients],
        "units": [_array_text(by_client.count[:clients]), _array_text(by_client.total[:clients])],
        "open": _array_text(by_client.open[:, :clients]),
        "batches": [_array_text(by_client.batches), _array_text(by_client.squares)],
    }


def _read_dependence(stored: dict[str, Any]) -> KindDependence:
    places = {bytes.fromhex(client): place for place, client in enumerate(stored["clients"])}
    clients, empty = len(stored["clients"]), KindDependence().by_client
    if len(places) != clients or clients > len(empty.count):
        raise ValueError("its clients do not belong together")
    count, total, opened = np.zeros_like(empty.count), np.zeros_like(empty.total), np.zeros_like(empty.open)
    for into, text in zip((count, total), stored["units"], strict=True):
        into[:clients] = _read_array(text, (clients, 1))
    opened[:, :clients] = _read_array(stored["open"], (len(opened), clients, 1))
    batches, squares = (_read_array(text, empty.batches.shape) for text in stored["batches"])
    by_client = ClientBatches(count, total, opened, batches, squares)
    first, last = _finite(stored["first"]), _finite(stored["last"])
    return KindDependence(_read_batches(stored["in_time"]), by_client, places, first, last)


def _read_test(stored: dict[str, Any]) -> KindTest:
    test = KindTest(
        Role(stored["role"]),
        float(stored["width"]),
        _count(stored["number"], 1),
        weight=_positive(stored["weight"]),
        window=_count(stored["window"]),
        token_cap=_positive(stored["token_cap"]),
        figure=Figure(stored.get("figure", Figure.NATS)),
        frozen=bool(stored["frozen"]),
        supported=bool(stored["supported"]),
        refused=_count(stored["refused"]),
        units=_count(stored["units"]),
        tokens=_count(stored["tokens"]),
    )
    total, squares = stored["gain"]
    test.gain = replace(test.gain, observations=test.units, total=_finite(total), squares=_finite(squares))
    test.counts = [_count(number, 1) for number in stored["counts"]]
    test.places = {bytes.fromhex(client): place for place, client in enumerate(stored["places"])}
    counted = base64.b64decode(stored["counted"], validate=True)
    digests = [counted[at : at + DIGEST_BYTES] for at in range(0, len(counted), DIGEST_BYTES)]
    test.counted = dict.fromkeys(digests)
    clients = len(test.counts)
    if clients > MAX_CLIENTS or len(test.places) != clients or len(digests) > MAX_UNITS:
        raise ValueError("its counts do not belong together")
    test.wealth[:clients] = _read_array(stored["wealth"], (clients, len(FRACTIONS)))
    test.opposing += _read_array(stored["opposing"], test.opposing.shape)
    test.sums[:clients] = _read_array(stored["sums"], (clients, test.sums.shape[1]))
    if test.figure is not Figure.NATS:
        test.kl_sums[:clients] = _read_array(stored["kl_sums"], (clients, test.kl_sums.shape[1]))
    if test.harm is not None:
        test.inherited = max(_finite(stored["inherited"]), 1.0)
        test.harm = _read_harm(stored["harm"])
    else:
        test.batches = _read_batches(stored["batches"])
    return test


def _harm_json(harm: HarmSum) -> dict[str, Any]:
    return {
        "number": harm.number,
        "units": harm.units,
        "places": [client.hex() for client in harm.places],
        "wealth": _array_text(harm.wealth[:, : harm.clients]),
        "runs": [[run.number, run.begun, _array_text(run.mark[:, : harm.clients])] for run in harm.runs],
    }


def _read_harm(stored: dict[str, Any]) -> HarmSum:
    places = {bytes.fromhex(client): place for place, client in enumerate(stored["places"])}
    clients = len(stored["places"])
    if clients > MAX_CLIENTS or len(places) != clients or len(stored["runs"]) > MAX_RUNS:
        raise ValueError("its counts do not belong together")
    harm = HarmSum(_count(stored["number"], 1), _count(stored["units"]), places)
    shape = (2, clients, len(FRACTIONS))
    harm.wealth[:, :clients] = _read_array(stored["wealth"], shape)
    for number, begun, text in stored["runs"]:
        mark = np.zeros_like(harm.wealth)
        mark[:, :clients] = _read_array(text, shape)
        harm.runs.append(Run(_count(number), _count(begun), mark))
    return harm


def _array_text(values: Floats) -> str:
    return base64.b64encode(values.astype("<f8").tobytes()).decode()


def _read_array(text: str, shape: tuple[int, ...]) -> Floats:
    values = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f8").reshape(shape)
    if not np.isfinite(values).all():
        raise ValueError("an array has values that are not finite")
    return values


def _count(value: Any, least: int = 0) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{str(value)[:20]} is not a count")
    return value


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("a number is not finite")
    return number


def _positive(value: Any) -> float:
    number = _finite(value)
    if number <= 0.0:
        raise ValueError("a number is not above 0")
    return number
