"""Folders in place of URLs, records in place of prompts, and no prompts at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.support.captures import capture
from tests.support.fake_vllm import FakeVllm
from tests.support.gate_servers import servers
from tests.support.paths import ROOT, SOURCES

from hemostat.cli import main
from hemostat.gate.asked import load
from hemostat.scoring.capture_arrays import decode_capture
from hemostat.scoring.spool.columns import to_rows
from hemostat.scoring.spool.keys import SpoolKey
from hemostat.scoring.spool.segments import segment_name, write_segment
from hemostat.scoring.spool.spooled import Spooled
from hemostat_lab.demo import vllm_server

PASS, FAIL, UNDECIDED = 0, 1, 2
Gate = Callable[..., tuple[int, str]]

STAND_IN = """
import os, sys, uvicorn
from pathlib import Path
from tests.support.fake_vllm import FakeVllm
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = Path(sys.argv[sys.argv.index("--model") + 1])
(folder / "pid").write_text(str(os.getpid()))
noise = float((folder / "config.json").read_text())
fake = FakeVllm(model=sys.argv[sys.argv.index("--served-model-name") + 1], noise=noise)
uvicorn.run(fake, host="127.0.0.1", port=int(sys.argv[sys.argv.index("--port") + 1]), lifespan="off", ws="none")
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, float], Path]:
    """A stand-in for vLLM, which the servers' processes find first; returns what makes a folder for it."""
    module = tmp_path / "path" / "vllm" / "entrypoints" / "openai" / "api_server.py"
    module.parent.mkdir(parents=True)
    module.write_text(STAND_IN)
    for folder in list(module.parents)[:3]:
        (folder / "__init__.py").touch()
    search = [tmp_path / "path", ROOT, *(ROOT / source for source in SOURCES)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, search)))
    monkeypatch.setattr(vllm_server, "is_packed", lambda checkpoint: False)

    def folder(name: str, noise: float) -> Path:
        made = tmp_path / name
        made.mkdir()
        (made / "config.json").write_text(str(noise))
        return made

    return folder


def ended(folder: Path) -> bool:
    """Returns True once the server of the folder has ended."""
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        try:
            os.kill(int((folder / "pid").read_text()), 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_folders_are_served_for_as_long_as_the_gate_runs(gate: Gate, stand_in: Callable[[str, float], Path]) -> None:
    stable, other = stand_in("stable", 0.0), stand_in("other", 1.0)
    code, text = gate(str(stable), str(other))
    assert code == FAIL, text
    assert text.startswith("fail: the candidate is far from the stable model")
    assert ended(stable)
    assert ended(other)


def test_a_server_ends_with_a_gate_that_is_killed(stand_in: Callable[[str, float], Path], prompts: Path) -> None:
    stable, same = stand_in("stable", 0.0), stand_in("same", 0.0)
    flags = ["--stable", str(stable), "--candidate", str(same), "--expect", "same", "--prompts", str(prompts)]
    process = subprocess.Popen(
        [sys.executable, "-m", "hemostat", "gate", *flags], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        give_up = time.monotonic() + 120
        while not (same / "pid").exists():
            assert process.poll() is None
            assert time.monotonic() < give_up
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert ended(stable)
    assert ended(same)


def test_a_folder_without_a_checkpoint_is_named(gate: Gate, tmp_path: Path) -> None:
    code, text = gate(str(tmp_path / "nothing"), "http://127.0.0.1:1")
    assert code == UNDECIDED
    assert "is neither the URL of a vLLM server nor the folder of a checkpoint" in text


def test_what_records_path_has_written_is_asked_again(gate: Gate, tmp_path: Path, prompts: Path) -> None:
    random = np.random.default_rng(5)
    folder = tmp_path / "captures"
    folder.mkdir()
    records = [
        {
            "request_id": str(n),
            "prompt_token_ids": random.integers(0, 250, 30).tolist(),
            "kind": "chat",
            "arm": "control",
        }
        for n in range(20)
    ]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with servers(FakeVllm(), FakeVllm()) as (stable, candidate):
        code, text = gate(stable, candidate, "--captures", str(folder))
    assert code == UNDECIDED, text
    assert "all prompts were asked after 20 prompts; about " in text


def test_the_files_of_a_spool_are_asked_again(gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(5)
    made = [
        capture(str(n), prompt_token_ids=random.integers(0, 250, 30).astype("<i4").tobytes(), kind="chat")
        for n in range(20)
    ]
    two_choices = [*made, made[0]]
    key = "ab" * 32
    monkeypatch.setenv("SPOOL_KEY", key)
    rows = to_rows([Spooled(decode_capture(one), 1_700_000_000.0) for one in two_choices])
    write_segment(tmp_path / f"{segment_name(1_700_000_000.0)}.parquet", rows, SpoolKey(bytes.fromhex(key)))
    with servers(FakeVllm(), FakeVllm()) as (stable, candidate):
        code, text = gate(stable, candidate, "--captures", str(tmp_path))
        assert code == UNDECIDED
        assert "it is encrypted; name its key by --key" in text
        code, text = gate(stable, candidate, "--captures", str(tmp_path), "--key", "env:SPOOL_KEY")
    assert code == UNDECIDED, text
    assert "all prompts were asked after 20 prompts; about " in text


def test_without_prompts_those_of_the_package_are_asked(capsys: pytest.CaptureFixture[str]) -> None:
    """There are enough of them for the default margin of `same`, 200, and each of their kinds may be required."""
    assert len(load(None)) >= 240
    flags = ["--stable", "http://127.0.0.1:1", "--candidate", "http://127.0.0.1:1", "--expect", "same"]
    assert main(["gate", *flags]) == UNDECIDED
    assert "prompts that come with Hemostat are asked" in capsys.readouterr().err
