"""`hemostat demo` with stand-ins for its two programs: it reports, and leaves no process, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.support.paths import ROOT, SOURCES

from hemostat_calibration.errors import HemostatError
from hemostat_lab.demo import programs
from hemostat_lab.demo import vllm_server as vllm_process
from hemostat_lab.demo.checkpoints import Checkpoints
from hemostat_lab.demo.options import DemoOptions
from hemostat_lab.demo.runner import run

STAND_IN = ROOT / "tests" / "support" / "stand_in.py"
PATCH = """
import sys
from pathlib import Path
from hemostat_lab.demo import vllm_server as vllm_process
from hemostat_lab.demo.checkpoints import Checkpoints
from hemostat_lab.demo import runner
vllm_process.installed = lambda: True
runner.cached_checkpoints = lambda scheme, say: Checkpoints(Path("reference"), Path("compressed"))
class Server(vllm_process.VllmServer):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._command = [sys.executable, STAND_IN, "vllm", str(self.port)]
runner.VllmServer = Server
runner.serve_command = lambda config, overrides: [sys.executable, STAND_IN, "serve", str(config)]
sys.exit(runner.run(runner.DemoOptions(requests=REQUESTS, report=Path("report.json"), console=False)))
"""


def started_by(tmp_path: Path) -> list[int]:
    """Every running process that inherited this test's environment variable."""
    mark = f"STAND_IN_RUN={tmp_path}\0".encode()
    result = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                marked = mark in (entry / "environ").read_bytes()
            except OSError:
                continue
            if marked and alive(int(entry.name)):
                result.append(int(entry.name))
    return result


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for(what: Any, within: float = 120.0) -> None:
    end = time.monotonic() + within
    while not what():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.05)


def demo(tmp_path: Path, requests: int | None, trouble: str = "") -> subprocess.Popen[str]:
    code = PATCH.replace("STAND_IN", repr(str(STAND_IN))).replace("REQUESTS", repr(requests))
    return subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-c", code],
        cwd=tmp_path,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", *SOURCES)),
            "STAND_IN_TROUBLE": trouble,
            "STAND_IN_RUN": str(tmp_path),
            "TMPDIR": str(tmp_path),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str], within: float = 120.0) -> str:
    """Its output. Fails with the stack of every thread if it has not ended after `within` seconds."""
    try:
        output, _ = process.communicate(timeout=within)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        try:
            output, _ = process.communicate(timeout=10)
        finally:
            process.kill()
        pytest.fail(f"still running after {within:.0f} s:\n{output}")
    return output


def test_bounded_run_ends_with_the_report(tmp_path: Path) -> None:
    with demo(tmp_path, 20) as process:
        output = ended(process)
    assert process.returncode == 0, output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["requests"] == {
        **{"sent": 20, "ok": 20, "failed": 0},
        **{"shadowed": 20, "scored": 20, "skipped": {}, "dropped": {}, "pending": 0},
    }
    assert report["tokens_scored"] == 200
    assert report["top_k"] == 64
    assert report["raw"] == report["calibrated"]
    assert report["profile"] == {"version": "identity", "family": "identity", "mode": "auto"}
    assert "ready. Console http://127.0.0.1:" in output
    assert output.count("propose abababab (learned): learned from 3001 tokens") == 1, "printed once"
    line = "background: adapter abababab: 38 of about 56 conversations of chat text, 4 min left"
    assert output.count(line) == 1, "printed when it changes"
    assert output.count("chat text sampled (100.0 % of the traffic): identity; needs about 34 more") == 1
    assert [event["decision"] for event in report["decisions"]] == ["propose"]
    page = (tmp_path / "report.html").read_text()
    assert "20 of 20 requests were answered; 200 tokens were scored by the reference." in page
    assert str(tmp_path / "report.html") in output


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_every_program(tmp_path: Path, sig: signal.Signals) -> None:
    with demo(tmp_path, None) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "ready" in line:
                break
        assert len(started_by(tmp_path)) == 3, "the demo, vLLM, Hemostat"
        process.send_signal(sig)
        output = ended(process)
    assert process.returncode == 0, output
    assert "stopped" in output
    assert started_by(tmp_path) == []
    assert json.loads((tmp_path / "report.json").read_text())["requests"]["sent"] >= 1
    assert "<h2>What to do next</h2>" in (tmp_path / "report.html").read_text(), "also after an early end"


def test_killed_demo_leaves_no_process(tmp_path: Path) -> None:
    with demo(tmp_path, None) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "ready" in line:
                break
        process.kill()
    wait_for(lambda: started_by(tmp_path) == [])


def test_exit_code_of_a_bounded_run_that_is_stopped(tmp_path: Path) -> None:
    with demo(tmp_path, 10**6) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "ready" in line:
                break
        process.send_signal(signal.SIGINT)
        ended(process)
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("vllm dies", "no memory today"),
        ("serve dies", "no reference today"),
        ("mismatch", "do not match: 64 ids against 65"),
        ("all fail", "no request succeeded"),
    ],
)
def test_failure_is_printed_and_every_program_stops(tmp_path: Path, trouble: str, message: str) -> None:
    with demo(tmp_path, 4, trouble) as process:
        output = ended(process)
    assert process.returncode == 1, output
    assert message in output
    assert started_by(tmp_path) == []


def test_settings_are_a_valid_configuration(tmp_path: Path) -> None:
    from hemostat.config.schema import Settings

    options = DemoOptions(keep=tmp_path, seed=-1)
    result = Settings.model_validate(
        programs.serve_settings(options, Checkpoints(tmp_path, tmp_path), "http://127.0.0.1:9", 8080, 8081, "t" * 20)
    )
    assert result.shadow.rate == 1.0
    assert result.shadow.top_k == 64
    assert result.calibration.mode == "auto"
    assert result.calibration.alpha == 0.05, "the same error probability as in a deployment"
    assert result.records.path == tmp_path / "records.jsonl"
    assert "--max-logprobs" in programs.vllm_arguments()
    assert vllm_process.LOGITS_PROCESSOR in programs.vllm_arguments()


def test_invalid_override_is_rejected_by_serve(tmp_path: Path) -> None:
    config = tmp_path / "hemostat.yaml"
    config.write_text("upstream: {url: 'http://127.0.0.1:9'}")
    command = programs.serve_command(config, ("calibration.min_token=9",))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "calibration.min_token" in done.stderr
    assert done.stderr.count("\n") == 1


def test_user_errors_are_raised_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "text").write_text("a letter")
    for options, message in (
        (DemoOptions(prompts=tmp_path / "none.jsonl"), "none.jsonl"),
        (DemoOptions(keep=tmp_path / "file"), "another place"),
        (DemoOptions(report=tmp_path), "--report"),
        (DemoOptions(html=tmp_path), "--html"),
        (DemoOptions(html=tmp_path / "text"), "--html: .* was not written by this command"),
    ):
        with pytest.raises(HemostatError, match=message):
            run(options)
