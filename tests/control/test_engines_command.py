"""`hemostat engines` against a real admin port."""

from __future__ import annotations

from asyncio import StreamWriter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.admin_server import Served, served
from tests.support.control import TOKEN, connect_relay, relay_stats
from tests.support.engine_registry import healthy

from hemostat import cli
from hemostat.commands import admin_port
from hemostat.control.composition import Control
from hemostat.reference.pair import ReferenceState

A, B = "10.0.0.1:8000", "10.0.0.2:8000"


@pytest.fixture
def instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    async def fill(control: Control, folder: Path) -> StreamWriter:
        control.monitor.state = ReferenceState.READY
        engines = {A: healthy(A, relays=2, up=2, outstanding=3, requests=70), B: healthy(B, relays=2, up=1)}
        control.engines.current = lambda: engines  # type: ignore[method-assign]
        return await connect_relay(control, folder, 1, relay_stats())

    with served(tmp_path, fill) as running:
        monkeypatch.setenv("HEMOSTAT_ADMIN_URL", running.url)
        monkeypatch.setenv("HEMOSTAT_ADMIN__TOKEN", TOKEN)
        yield running


def states(capsys: pytest.CaptureFixture[str], *arguments: str, problem: str = "") -> dict[str, str]:
    """By engine, the rest of its line. problem: how the one line about what is wrong begins, if there is one."""
    assert cli.main(["engines", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    if problem:
        assert lines.pop(0).startswith(problem)
    assert lines.pop(0).startswith("engine ")
    assert lines.pop().startswith("outlier engine: off: upstream.affinity: the conversation decides")
    return {line.split()[0]: " ".join(line.split()[1:]) for line in lines}


def test_it_shows_drains_and_resumes(instance: Served, capsys: pytest.CaptureFixture[str]) -> None:
    ejected = f"warning: 1 of 2 engines gets no requests: {B} (for 1 of 2 relays) (since 20"
    assert states(capsys, problem=ejected) == {
        A: "up 3 70 - - not known",
        B: "up for 1 of 2 relays 0 0 - - not known",
    }
    assert states(capsys, "--drain", B)[B].startswith("drained")
    assert instance.do(lambda control: control.engines.drained) == {B}
    assert states(capsys, "--resume", B, problem=ejected)[B].startswith("up")
    assert instance.do(lambda control: control.engines.drained) == frozenset()


def test_engines_that_do_not_answer_are_named(instance: Served, capsys: pytest.CaptureFixture[str]) -> None:
    dead = {A: healthy(A, relays=2)}
    instance.do(lambda control: setattr(control.engines, "current", lambda: dead))
    assert states(capsys, problem="critical: vLLM does not answer (since 20") == {A: "failing 0 0 - - 0"}


def test_an_engine_whose_canaries_are_not_compared_is_named(
    instance: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    why = "serves m from /b, the set is of m from /a"

    def fail(control: Any) -> None:
        report = control.canaries.report() | {"failures": {A: why}}
        control.canaries.report = lambda: report

    instance.do(fail)
    assert cli.main(["engines"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"canaries: {A} is not compared: {why}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--drain", "10.0.0.9:8000"], "the engines are 10.0.0.1:8000, 10.0.0.2:8000"),
        (["--drain", A, "--token", "wrong"], "401"),
        (["--drain", A, "--resume", B], "not allowed with"),
        (["--admin", "http://127.0.0.1:1"], "is hemostat serve running?"),
        (["--token", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"], "not ASCII"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    instance: Served, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["engines", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err


@pytest.mark.parametrize(
    ("answered", "said"),
    [
        (b"<html>", "no JSON object"),
        (b"[]", "no JSON object"),
        (b"{}", "of this version"),
        (b'{"upstream": [{"engine": "a:1", "figures": {}}]}', "of this version"),
    ],
)
def test_another_server_at_that_address_is_named_in_one_line(
    answered: bytes, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    response = httpx.Response(200, content=answered)
    monkeypatch.setattr(admin_port, "admin_request", lambda *_arguments, **_body: response)
    assert cli.main(["engines"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err
