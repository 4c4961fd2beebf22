"""The benchmark of faults of engines, with a fake engine in the place of vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("tokenizers", reason="the benchmark takes a tokenizer apart, which needs the package tokenizers")
from tests.bench import canary_faults
from tests.bench.canary_faults import Case, cases, missing, report
from tests.support.fake_vllm import FakeVllm, serving
from tests.support.running_vllm import RunningVllm

from hemostat.canaries import client
from hemostat.canaries.prompts import Prompt, Prompts
from hemostat_calibration import canary_cause

FAULTS = {
    "none": [Case(), Case()],
    "decoding": [Case(("decoding", {})), Case(("decoding", {}))],
    "prefix": [Case(("prefix", {}))],
    "weights": [Case(("noise", {}))],
    "eight streams": [Case(("batch", {}), streams=2)],
    "temperature": [Case(arguments=("0.2",))],
}


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Case | None]:
    """The cases that a server was started for."""
    fake, starts = FakeVllm(plugin=True, prefix_caching=True), list[Case | None]()

    @contextmanager
    def running(case: Case | None) -> Iterator[RunningVllm]:
        starts.append(case)
        fake.default_temperature = 1.0 if case is None else float(case.arguments[0])
        fake.fault, fake.noise = "", 0.0
        with serving(fake) as url:
            yield cast(RunningVllm, SimpleNamespace(url=url, model="fake", admin=SimpleNamespace(signed=dict)))

    def inject(_: Any, fault: tuple[str, dict[str, Any]] | None) -> None:
        kind = "" if fault is None else fault[0]
        fake.fault, fake.noise = ("", 0.3) if kind == "noise" else (kind, 0.0)

    prompts = Prompts(tuple(Prompt(f"{n} a prompt with the number {n} {'x' * n}") for n in range(16)), "")
    monkeypatch.setattr(canary_faults, "WORK", tmp_path / "faults")
    monkeypatch.setattr(canary_faults, "running", running)
    monkeypatch.setattr(canary_faults, "inject", inject)
    monkeypatch.setattr(canary_faults, "prompts", lambda: prompts)
    monkeypatch.setattr(canary_faults, "cases", lambda: FAULTS)
    monkeypatch.setattr(canary_cause, "MIN_TEXT", 10_000)
    monkeypatch.setattr(client, "ANSWER_TOKENS", 20)
    return starts


def test_each_way_finds_its_faults_and_what_is_measured_is_kept(
    starts: list[Case | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [fault for fault, _, _ in missing()][:3] == ["none", "decoding", "prefix"]
    begun = iter([False] * 3)
    first = report(lambda: next(begun, True))
    assert (first["missing"], first["none"]["measured"], first["weights"]["measured"]) == (6, 1, 0)
    assert starts == [None]
    rows = report(lambda: False)
    ways = ("found", "decoded", "prefix", "texts", "prompt_logprobs")
    assert {name: [row[way] for way in ways] for name, row in rows.items() if name != "missing"} == {
        "none": [0, 0, 0, 0, 0],
        "decoding": [2, 2, 2, 0, 0],
        "prefix": [1, 0, 1, 0, 0],
        "weights": [1, 1, 1, 0, 1],
        "eight streams": [1, 1, 1, 0, 1],
        "temperature": [1, 0, 0, 1, 0],
    }
    assert rows["missing"] == 0
    assert len(starts) == 3
    report(lambda: False)
    assert len(starts) == 3, "what is there is not measured again"


def test_ten_faults_at_five_places_each() -> None:
    found = cases()
    assert len(found) == 11
    assert {len(each) for each in found.values()} == {5}
    assert all(len({repr(case) for case in each}) == 5 for name, each in found.items() if name != "none")
