from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from tests.support.taps import sent

from hemostat import __version__
from hemostat.engines import answer_buffer as answers_module
from hemostat.engines import reports as reports_module
from hemostat.engines import taps as taps_module
from hemostat.engines.answer_buffer import AnswerBuffer
from hemostat.engines.api import MAX_REPORT_BYTES, engine_router
from hemostat.engines.messages import (
    MAX_POSITIONS,
    MAX_RUNS,
    MAX_VERSIONS_PER_TAP,
    AnswerMessage,
    InvalidEngineMessage,
    RankReport,
    TapAnswer,
    TapMessage,
    TapRun,
    decode_answers,
    decode_report,
    decode_tap,
)
from hemostat.engines.reports import PluginReports
from hemostat.metrics import names

A, B, C, D = ("a" * 32, "b" * 32, "c" * 32, "d" * 32)


def report(
    boot: str = "boot", rank: int = 0, size: int = 1, versions: tuple[str, ...] = (A,), **counters: int
) -> RankReport:
    return RankReport(boot, rank, size, list(versions), 100, counters, "v1", "0.32.0")


def run(start: int, values: list[float | None], nonce: str = "n", applied: str | None = A, version: str = A) -> TapRun:
    return TapRun(nonce, start, len(values), {version: sent(values)}, applied)


def test_acknowledged_is_what_every_rank_of_every_engine_holds() -> None:
    registry = PluginReports()
    assert registry.acknowledged(0.0) == frozenset()
    registry.update(report("x", 0, 2, (A, B)), 0.0)
    assert registry.acknowledged(0.0) == frozenset()
    registry.update(report("x", 1, 2, (A, B)), 0.0)
    assert registry.acknowledged(0.0) == {A, B}
    registry.update(report("y", 0, 1, (B, C)), 0.0)
    assert registry.acknowledged(0.0) == {B}
    registry.update(report("y", 0, 1, (C,)), 1.0)
    assert registry.acknowledged(1.0) == frozenset()


def test_a_restarted_engine_holds_nothing_until_it_reports_and_the_old_one_expires() -> None:
    registry = PluginReports()
    registry.update(report("old", versions=(A,), rows_applied=5), 0.0)
    registry.update(report("new", versions=()), 10.0)
    assert registry.acknowledged(10.0) == frozenset()
    registry.update(report("new", versions=(B,), rows_applied=2), 12.0)
    assert registry.acknowledged(12.0) == frozenset()
    assert registry.acknowledged(15.1) == {B}
    assert registry.counters(15.1) == {"rows_applied": 7}
    assert [r.boot_id for r in registry.live(15.1)] == ["new"]


def test_one_silent_rank_ends_the_acknowledgement() -> None:
    registry = PluginReports()
    registry.update(report("x", 0, 2), 0.0)
    registry.update(report("x", 1, 2), 0.0)
    registry.update(report("x", 0, 2), 10.0)
    assert registry.acknowledged(10.0) == {A}
    assert registry.acknowledged(16.0) == frozenset()


def test_a_request_that_three_ranks_counted_is_one_request() -> None:
    registry = PluginReports()
    for rank, errors in enumerate((0, 2, 1)):
        registry.update(report("x", rank, 3, requests_bound=4, fetch_errors=errors), 0.0)
    registry.update(report("y", requests_bound=1), 20.0)
    assert registry.counters(20.0) == {"requests_bound": 5, "fetch_errors": 2}


def test_hold_is_bounded_and_in_order() -> None:
    registry = PluginReports()
    wanted = [f"{i:032x}" for i in range(20)]
    registry.set_wanted([wanted[0], *wanted])
    assert registry.update(report(), 0.0) == wanted[: reports_module.MAX_HELD_VERSIONS]


def test_engines_are_bounded() -> None:
    registry = PluginReports()
    for i in range(reports_module.MAX_ENGINES + 10):
        registry.update(report(f"boot{i}", taps_sent=1), 0.0)
    assert len(registry.live(0.0)) == reports_module.MAX_ENGINES
    assert registry.counters(0.0) == {"taps_sent": reports_module.MAX_ENGINES + 10}


def test_ranks_that_disagree_about_their_number_are_refused() -> None:
    registry = PluginReports()
    registry.update(report("x", 0, 2), 0.0)
    with pytest.raises(InvalidEngineMessage, match="world_size"):
        registry.update(report("x", 1, 3), 0.0)


@given(st.permutations(range(6)))
def test_runs_may_come_in_any_order(order: list[int]) -> None:
    registry = PluginReports()
    for i in order:
        registry.taps.update(TapMessage("boot", [run(2 * i, [float(2 * i), float(2 * i + 1)])]), 0.0)
    taken = registry.taps.take("n", 99)
    assert taken is not None
    np.testing.assert_array_equal(taken.log_normalizer[A], np.arange(12.0))
    assert not taken.mixed


def test_gaps_are_nan_later_runs_replace_earlier_ones_and_a_change_of_profile_is_seen() -> None:
    registry = PluginReports()
    registry.taps.update(TapMessage("boot", [run(0, [1.0, None]), run(4, [5.0])]), 0.0)
    assert registry.taps.covered("n") == 2
    registry.taps.update(TapMessage("boot", [run(0, [7.0], applied=None), run(4, [8.0], version=B, applied=None)]), 0.0)
    taken = registry.taps.take("n", 99)
    assert taken is not None
    np.testing.assert_array_equal(taken.log_normalizer[A], [7.0, np.nan, np.nan, np.nan, 5.0])
    np.testing.assert_array_equal(taken.log_normalizer[B], [np.nan] * 4 + [8.0])
    assert (taken.applied, taken.mixed) == (None, True)
    assert registry.taps.covered("n") == 0


def test_taps_expire_and_are_bounded() -> None:
    registry = PluginReports()
    registry.taps.update(TapMessage("boot", [run(0, [1.0], "old")]), 0.0)
    registry.taps.update(TapMessage("boot", [run(0, [1.0], "young")]), 100.0)
    registry.taps.update(TapMessage("boot", []), 121.0)
    assert registry.taps.take("old", 99) is None
    assert registry.taps.take("young", 99) is not None
    many = [run(0, [1.0], f"n{i}") for i in range(taps_module.MAX_TAPPED_REQUESTS + 5)]
    registry.taps.update(TapMessage("boot", many), 121.0)
    assert registry.taps.take("n4", 99) is None
    assert registry.taps.take("n5", 99) is not None
    assert registry.taps.runs_dropped == 6
    full = TapRun("n", 0, MAX_POSITIONS, {}, None)
    registry.taps.update(TapMessage("boot", [full, full]), 121.0)
    assert registry.taps.runs_dropped == 7


def test_what_is_made_of_a_message_is_bounded_by_the_output_and_not_by_the_positions_that_it_names() -> None:
    """A message of 45 kB named 960 versions and the last position: `take` made 1.9 GiB of it."""
    registry = PluginReports()
    versions = iter(f"{number:032x}" for number in range(1000))
    runs = [
        TapRun("n", MAX_POSITIONS - 1, 1, {next(versions): sent([0.5]) for _ in range(16)}, None, D, b"12" * 1000)
        for _ in range(60)
    ]
    message = decode_tap(msgspec.msgpack.encode(TapMessage("boot", [run(0, [1.0, 2.0, 3.0]), *runs])))
    registry.taps.update(message, 0.0)
    tracemalloc.start()
    try:
        taken = registry.taps.take("n", 2)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
    assert taken is not None
    assert taken.log_normalizer[A].tolist() == [1.0, 2.0]
    assert len(taken.log_normalizer) == MAX_VERSIONS_PER_TAP
    assert {len(values) for values in taken.log_normalizer.values()} == {2}


def test_the_numbers_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = PluginReports()
    monkeypatch.setattr(taps_module, "MAX_WAITING_NUMBER_BYTES", 10_000)
    for number in range(10):
        registry.taps.update(TapMessage("boot", [run(0, [1.0] * 200, f"n{number}")]), 0.0)
    result = [registry.taps.take(f"n{number}", 99) is not None for number in range(10)]
    assert result == [False] * 6 + [True] * 4
    assert registry.taps.runs_dropped == 6
    # What was taken makes room.
    registry.taps.update(TapMessage("boot", [run(0, [1.0] * 800, "large")]), 0.0)
    registry.taps.update(TapMessage("boot", [run(0, [1.0] * 200, "other")]), 0.0)
    assert registry.taps.runs_dropped == 6
    with pytest.raises(InvalidEngineMessage, match=r"\$\.taps"):
        decode_tap(msgspec.msgpack.encode({"boot_id": "b", "taps": [{}] * (MAX_RUNS + 1)}))


def test_the_names_of_counters_are_those_that_are_documented() -> None:
    registry = PluginReports()
    for number in range(100):
        registry.update(report(f"boot{number}", **{f"x{number}": 1, "rows_applied": 2}), 20.0 * number)
    assert registry.counters(2000.0) == {"rows_applied": 200}


def test_engines_are_counted_by_the_version_of_their_plugin_while_they_report() -> None:
    registry = PluginReports()
    for number, version in enumerate(("0.2.0", "0.2.0", "")):
        for rank in range(2):
            last = msgspec.structs.replace(report(f"boot{number}", rank, 2), plugin=version)
            registry.update(last, 5.0 * number)
    assert registry.plugins(10.0) == {"0.2.0": 2, "": 1}
    assert registry.plugins(24.0) == {"": 1}


def test_the_metric_names_the_version_of_every_plugin_and_says_if_it_fits() -> None:
    registry = PluginReports()
    for boot, version in (("a", __version__), ("b", "0.1.0"), ("c", "")):
        registry.update(msgspec.structs.replace(report(boot), plugin=version), 0.0)
    shown = {sample.labels: sample.value for sample in registry.samples(0.0) if sample.name == names.ENGINE_PLUGINS}
    assert shown == {(__version__, "yes"): 1, ("0.1.0", "no"): 1, ("unknown", "no"): 1}


GOOD = {
    "boot_id": "b",
    "rank": 0,
    "world_size": 1,
    "versions": [A],
    "vocab_size": 5,
    "counters": {"rows_applied": 3},
    "runner": "v2",
    "vllm": "0.32.0",
}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"boot_id": "../x"}, "boot_id"),
        ({"boot_id": "b\n"}, "boot_id"),
        ({"rank": 1}, "rank is 1"),
        ({"rank": -1}, r"\$\.rank"),
        ({"versions": ["A" * 32]}, r"\$\.versions"),
        ({"versions": [A] * 65}, r"\$\.versions"),
        ({"versions": [A + "\n"]}, r"\$\.versions"),
        ({"counters": {"x": -1}}, r"\$\.counters"),
        ({"counters": {"x": 2**63}}, r"\$\.counters"),
        ({"vocab_size": "5"}, r"\$\.vocab_size"),
        ({"plugin": "0.3.0\n"}, r"\$\.plugin"),
        ({"plugin": '0"} 1'}, r"\$\.plugin"),
        ({"plugin": "0" * 65}, r"\$\.plugin"),
    ],
)
def test_a_bad_report_is_refused_by_field(change: dict[str, Any], named: str) -> None:
    assert decode_report(json.dumps(GOOD).encode()).versions == [A]
    assert decode_report(json.dumps(GOOD | {"plugin": "0.3.0rc1+local_1"}).encode()).plugin == "0.3.0rc1+local_1"
    with pytest.raises(InvalidEngineMessage, match=named):
        decode_report(json.dumps(GOOD | change).encode())


@given(
    st.binary(max_size=40)
    | st.recursive(st.none() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=3), st.lists).flatmap(
        lambda o: st.sampled_from([json.dumps(o).encode(), msgspec.msgpack.encode(o)])
    )
)
def test_decoders_answer_or_raise_their_error(body: bytes) -> None:
    for decode in (decode_report, decode_tap):
        with pytest.raises(InvalidEngineMessage):
            decode(body)


def test_a_tap_whose_lengths_do_not_agree_is_refused() -> None:
    tap = {"nonce": "n", "start": 0, "tokens": 2, "versions": {A: sent([1.0])}, "applied": None}
    with pytest.raises(InvalidEngineMessage, match="8 bytes of values"):
        decode_tap(msgspec.msgpack.encode({"boot_id": "b", "taps": [tap]}))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"anchors": D}, "only one of anchors and features"),
        ({"set_rows": b"1234"}, "4 bytes of set_rows"),
        ({"features": b"1234"}, "only one of anchors and features"),
        ({"anchors": D, "features": b""}, "0 bytes of features"),
        ({"anchors": D, "features": b"123456"}, "6 bytes of features"),
        ({"anchors": "x", "features": b"1234"}, r"\$\.taps\[0\]\.anchors"),
        ({"anchors": D, "features": 3}, r"\$\.taps\[0\]\.features"),
        ({"nonce": "a/b"}, r"\$\.taps\[0\]\.nonce"),
        ({"start": MAX_POSITIONS - 1}, "beyond position"),
    ],
)
def test_a_bad_tap_is_refused_by_field(change: dict[str, Any], named: str) -> None:
    tap = {"nonce": "n", "start": 0, "tokens": 2, "versions": {A: sent([1.0, None])}, "applied": None}
    assert decode_tap(msgspec.msgpack.encode({"boot_id": "b", "taps": [tap]})).taps[0].features is None
    with pytest.raises(InvalidEngineMessage, match=named):
        decode_tap(msgspec.msgpack.encode({"boot_id": "b", "taps": [tap | change]}))


def with_features(start: int, values: list[list[float]], nonce: str = "n", anchors: str = D) -> TapRun:
    return TapRun(nonce, start, len(values), {}, None, anchors, np.array(values, "<f2").tobytes())


def test_features_are_joined_by_position_and_of_one_set_of_anchors() -> None:
    registry = PluginReports()
    registry.taps.update(TapMessage("boot", [with_features(0, [[9.0, 9.0, 9.0]], anchors=C)]), 0.0)
    registry.taps.update(TapMessage("boot", [with_features(1, [[1.0, -1.0], [2.0, -2.0]]), run(3, [0.5])]), 0.0)
    registry.taps.update(
        TapMessage("boot", [with_features(2, [[3.0, -3.0]]), with_features(0, [[7.0, 7.0, 7.0]])]), 0.0
    )
    taken = registry.taps.take("n", 99)
    assert taken is not None
    assert taken.features is not None
    # The width of the set is that of its last run; one that does not fit it is no row of this set.
    assert (taken.features.anchors, taken.features.values.shape, taken.features.values.dtype) == (D, (4, 3), "float32")
    registry.taps.update(TapMessage("boot", [with_features(1, [[1.0, -1.0], [2.0, -2.0]]), run(3, [0.5])]), 0.0)
    registry.taps.update(TapMessage("boot", [with_features(2, [[3.0, -3.0]])]), 0.0)
    taken = registry.taps.take("n", 99)
    assert taken is not None
    assert taken.features is not None
    np.testing.assert_array_equal(taken.features.values, [[np.nan] * 2, [1.0, -1.0], [3.0, -3.0], [np.nan] * 2])
    registry.taps.update(TapMessage("boot", [run(0, [0.5])]), 0.0)
    taken = registry.taps.take("n", 99)
    assert taken is not None
    assert taken.features is None


def test_features_are_bounded_and_the_numbers_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taps_module, "MAX_WAITING_FEATURE_BYTES", 10)
    registry = PluginReports()
    for nonce in ("a", "b", "c"):
        registry.taps.update(TapMessage("boot", [with_features(0, [[1.0, 2.0]], nonce)]), 0.0)
    result = [registry.taps.take(nonce, 99) for nonce in ("a", "c")]
    assert [taken.features is None if taken else None for taken in result] == [False, True]
    # What was taken, or expired, makes room.
    registry.taps.update(TapMessage("boot", [with_features(0, [[1.0, 2.0]], "d")]), 121.0)
    registry.taps.update(TapMessage("boot", [with_features(0, [[1.0, 2.0]], "e")]), 121.0)
    monkeypatch.setattr(taps_module, "MAX_REQUEST_FEATURE_BYTES", 100)
    registry.taps.update(TapMessage("boot", [with_features(1000, [[1.0, 2.0]], "d")]), 122.0)
    taken = registry.taps.take("d", 99)
    assert taken is not None
    assert taken.features is None


@pytest.fixture
def client() -> Iterator[TestClient]:
    registry = PluginReports()
    registry.set_wanted([B])
    app = FastAPI()
    app.include_router(engine_router(registry, {A: b"bytes"}.get, lambda: 0.0))
    app.state.registry = registry
    with TestClient(app) as client:
        yield client


def test_the_routes(client: TestClient) -> None:
    reported = client.post("/api/v1/engine/report", json=GOOD)
    own = {"nonce_prefix": "", "secrets": client.app.state.registry.secrets.for_engines(0.0)}  # type: ignore[attr-defined]
    assert (reported.status_code, reported.json()) == (200, {"hold": [B]} | own)
    tap = {"nonce": "n", "start": 0, "tokens": 1, "versions": {A: sent([1.5])}, "applied": A}
    body = msgspec.msgpack.encode({"boot_id": "b", "taps": [tap]})
    assert client.post("/api/v1/engine/tap", content=body).status_code == 204
    assert client.app.state.registry.taps.covered("n") == 1  # type: ignore[attr-defined]
    body = msgspec.msgpack.encode(AnswerMessage("b", [answer()], 0))
    handed = client.post("/api/v1/engine/answers", content=body)
    assert (handed.status_code, handed.json()) == (200, own)
    assert client.app.state.registry.answers.complete("n", 1)  # type: ignore[attr-defined]
    assert client.get(f"/api/v1/engine/profiles/{A}").content == b"bytes"
    assert client.get(f"/api/v1/engine/profiles/{B}").status_code == 404
    assert client.get("/api/v1/engine/profiles/..%2F..%2Fetc").status_code == 404


def test_the_routes_refuse(client: TestClient) -> None:
    bad = client.post("/api/v1/engine/report", json=GOOD | {"rank": 7})
    assert (bad.status_code, bad.json()["detail"]) == (400, "rank is 7: it must be below world_size, 1")
    assert client.post("/api/v1/engine/tap", content=b"{").status_code == 400
    assert client.post("/api/v1/engine/report", content=b" " * (MAX_REPORT_BYTES + 1)).status_code == 413


def ids(*values: int) -> bytes:
    return np.array(values, "<i4").tobytes()


def child_run(child: int, output: list[int], nonce: str = "n", start: int = 0) -> TapRun:
    """Positions from `start` on of a child whose engine knows all ids of its output but the last."""
    before = [-1, *output[:-1]][start:]
    return TapRun(
        nonce, start, len(before), {A: sent([float(child)] * len(before))}, None, child=child, previous_ids=ids(*before)
    )


def test_each_choice_is_found_by_its_ids() -> None:
    registry = PluginReports()
    outputs = [[5, 6, 7], [5, 6, 8], [5, 6], [9]]
    runs = [child_run(child, output) for child, output in enumerate(outputs)]
    registry.taps.update(TapMessage("boot", [*runs[:1], *runs[2:]]), 0.0)
    assert registry.taps.covered("n", ids(5, 6, 8, 1)) == 3  # the best of those that fit so far
    registry.taps.update(TapMessage("boot", runs[1:2]), 0.0)
    assert registry.taps.covered("n", ids(9, 9)) == 1
    result = {}
    for output in ([9], [5, 6], [5, 6, 8], [5, 6, 7]):
        taken = registry.taps.take("n", 99, ids(*output))
        assert taken is not None
        result[tuple(output)] = taken.log_normalizer[A].tolist()
    # Two answers that differ in the last id only have the same numbers: either may be taken for the other.
    assert result[9,] == [3.0]
    assert result[5, 6] == [2.0, 2.0]
    assert sorted((result[5, 6, 8][0], result[5, 6, 7][0])) == [0.0, 1.0]
    assert registry.taps.take("n", 99, ids(9)) is None
    assert registry.taps.runs_dropped == 0


def test_a_choice_whose_ids_no_child_has_gets_no_numbers() -> None:
    registry = PluginReports()
    registry.taps.update(TapMessage("boot", [child_run(0, [5, 6, 7]), child_run(1, [5, 1, 2])]), 0.0)
    assert registry.taps.covered("n", ids(4, 6, 7)) == 0
    assert registry.taps.take("n", 99, ids(4, 6, 7)) is None
    taken = registry.taps.take("n", 99, ids(5, 1, 9))
    assert taken is not None
    assert taken.log_normalizer[A].tolist() == [1.0] * 3


def test_a_choice_that_a_stop_string_ended_is_found_though_the_engine_went_on() -> None:
    registry = PluginReports()
    outputs = [[5, 6, 7, 8, 9, 1], [5, 6, 7, 8], [4, 6, 7]]
    registry.taps.update(TapMessage("boot", [child_run(child, output) for child, output in enumerate(outputs)]), 0.0)
    assert registry.taps.covered("n", ids(5, 6)) == 4, "the nearest length"
    taken = registry.taps.take("n", 99, ids(5, 6))
    assert taken is not None
    assert taken.log_normalizer[A].tolist() == [1.0] * 4


def test_an_older_plugins_runs_belong_to_the_one_choice() -> None:
    registry = PluginReports()
    registry.taps.update(TapMessage("boot", [run(0, [1.0, 2.0])]), 0.0)
    assert registry.taps.covered("n") == registry.taps.covered("n", ids(1, 2)) == 2
    taken = registry.taps.take("n", 99, ids(1, 2))
    assert taken is not None
    assert taken.log_normalizer[A].tolist() == [1.0, 2.0]


def test_choices_that_are_not_taken_expire_and_their_features_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taps_module, "MAX_WAITING_FEATURE_BYTES", 24)
    registry = PluginReports()
    features = np.zeros((2, 3), "<f2").tobytes()
    assert len(features) == 12

    def update(*children: int, nonce: str = "n") -> None:
        runs = [
            msgspec.structs.replace(child_run(child, [child, 5]), nonce=nonce, anchors=D, features=features)
            for child in children
        ]
        registry.taps.update(TapMessage("boot", runs), 0.0)

    def with_features(child: int, nonce: str = "n") -> bool:
        taken = registry.taps.take(nonce, 99, ids(child, 5))
        assert taken is not None
        return taken.features is not None

    update(0, 1, 2)
    assert not with_features(2), "there is room for two"
    assert with_features(1)
    update(3, 4)
    assert not with_features(4), "one was taken, and the next one has its room"
    registry.taps.expire(1000.0)
    assert registry.taps.covered("n", ids(0, 5)) == registry.taps.runs_dropped == 0
    update(0, 1, nonce="m")
    assert with_features(0, "m")
    assert with_features(1, "m"), "all of the room is free again"


def answer(nonce: str = "n", choice: int = 0, choices: int = 1, tokens: int = 2, call: int = 0) -> TapAnswer:
    output = np.arange(tokens, dtype="<i4")
    candidates = np.stack([output, output + 1], axis=1)
    logprobs = np.full((tokens, 2), -1.0, "<f4")
    return TapAnswer(
        *(nonce, call, choice, choices, ids(1, 2, 3), output.tobytes(), 1, candidates.tobytes(), logprobs.tobytes()),
        *(np.full(tokens, -1.0, "<f4").tobytes(), "stop"),
    )


def test_answers_wait_until_they_are_taken_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = AnswerBuffer()
    buffer.update(AnswerMessage("boot", [answer(choice=1, choices=2)], 3), 0.0)
    assert not buffer.complete("n", 2)
    buffer.update(AnswerMessage("boot", [answer(choice=0, choices=2)], 3), 0.0)
    assert buffer.complete("n", 2)
    assert [taken.choice for taken in buffer.take("n")] == [0, 1]
    assert buffer.take("n") == []
    buffer.update(AnswerMessage("boot", [answer("old")], 4), 0.0)
    buffer.update(AnswerMessage("other", [answer("young")], 1), 100.0)
    buffer.expire(121.0)
    assert (buffer.complete("old", 1), buffer.complete("young", 1)) == (False, True)
    monkeypatch.setattr(answers_module, "MAX_WAITING_REQUESTS", 3)
    buffer.update(AnswerMessage("boot", [answer(f"n{i}") for i in range(5)], 4), 121.0)
    assert [buffer.complete(f"n{i}", 1) for i in range(5)] == [False, False, True, True, True]
    monkeypatch.setattr(answers_module, "MAX_WAITING_BYTES", sum(answer(f"n{i}").size for i in (2, 3, 4)))
    buffer.update(AnswerMessage("boot", [answer("more")], 4), 121.0)
    # The one that has waited longest makes room.
    assert [buffer.complete(name, 1) for name in ("n2", "n3", "n4", "more")] == [False, True, True, True]
    counts = {sample.labels[0]: sample.value for sample in buffer.samples()}
    assert counts == {"received": 10, "dropped": 5, "dropped_at_engine": 5}
    for name in ("n3", "n4", "more"):
        buffer.take(name)
    # Nothing that was taken, has expired or was dropped takes room any more.
    buffer.update(AnswerMessage("boot", [answer(f"m{i}") for i in range(3)], 4), 121.0)
    assert [buffer.complete(f"m{i}", 1) for i in range(3)] == [True, True, True]


def test_a_nonce_that_a_client_uses_for_all_its_requests_takes_bounded_room_and_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answers_module, "MAX_ANSWERS_PER_REQUEST", 2)
    room = answer().size + answer(tokens=3).size
    monkeypatch.setattr(answers_module, "MAX_WAITING_BYTES", 2 * room)
    buffer = AnswerBuffer()
    for second in (0, 50, 100, 119):
        buffer.update(AnswerMessage("boot", [answer(call=second)], 0), float(second))
        buffer.update(AnswerMessage("boot", [answer(call=0, tokens=3)], 0), float(second))
    assert buffer.complete("n", 2)
    assert not buffer.complete("n", 3)
    buffer.expire(170.0)
    assert buffer.complete("n", 2)
    # 120 s after the last answer that was kept and not only replaced.
    buffer.expire(170.1)
    assert (buffer.take("n"), buffer.dropped) == ([], 4)
    for name in ("x", "y"):
        buffer.update(AnswerMessage("boot", [answer(name), answer(name, call=1, tokens=3)], 0), 170.1)
    assert buffer.complete("x", 2)
    assert buffer.complete("y", 2), "the first one's answers take no room any more"


@pytest.mark.parametrize(
    ("what", "asked"), [("answers", PluginReports.hands_out_answers), ("sets", PluginReports.tells_sets)]
)
def test_answers_and_sets_are_handed_out_only_where_every_engine_does(
    what: str, asked: Callable[[PluginReports, float], bool]
) -> None:
    registry = PluginReports()
    assert not asked(registry, 0.0)
    registry.update(msgspec.structs.replace(report("x"), **{what: True}), 0.0)
    assert asked(registry, 0.0)
    registry.update(report("old"), 0.0)
    assert not asked(registry, 0.0)
    assert asked(registry, 15.1) is False  # both are silent


def test_an_answer_whose_lengths_do_not_agree_is_refused() -> None:
    def encoded(**change: Any) -> bytes:
        return msgspec.msgpack.encode(AnswerMessage("boot", [msgspec.structs.replace(answer(), **change)], 0))

    assert decode_answers(encoded()).answers[0].tokens == 2
    for change, named in (
        ({"candidate_ids": b"1234"}, "candidate_ids"),
        ({"candidate_logprobs": b""}, "candidate_logprobs"),
        ({"emitted_logprobs": b"1234"}, "emitted_logprobs"),
        ({"token_ids": b"123"}, "token_ids"),
        ({"prompt_ids": b"123"}, "prompt_ids"),
        ({"choice": 1}, "choice 1 of 1"),
        ({"top_k": 2}, "candidate_ids"),
        ({"top_k": 129}, r"\$\.answers\[0\]\.top_k"),
        ({"nonce": "a/b"}, r"\$\.answers\[0\]\.nonce"),
        ({"nonce": "a\n"}, r"\$\.answers\[0\]\.nonce"),
    ):
        with pytest.raises(InvalidEngineMessage, match=named):
            decode_answers(encoded(**change))


def test_a_count_that_would_stay_in_a_metric_is_refused() -> None:
    with pytest.raises(InvalidEngineMessage, match=r"\$\.dropped"):
        decode_answers(msgspec.msgpack.encode(AnswerMessage("boot", [answer()], 2**64 - 1)))
