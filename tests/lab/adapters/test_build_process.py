"""The process that makes an adapter: a job folder in, a profile and a report out, killed at any moment."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support.adapter_models import TinyCheckpoints, random_texts

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

# Without the low priority that the module gives itself: on a busy machine it would hardly run.
RUN = (
    "import sys, pathlib; from hemostat_lab.adapters.build_process import main; "
    "sys.exit(main(pathlib.Path(sys.argv[1])))"
)
WORKER = [sys.executable, "-W", "ignore", "-c", RUN]


def write(folder: Path, tiny: TinyCheckpoints, **options: Any) -> None:
    from hemostat.adapters.live.build_messages import Job, JobOptions, write_job

    texts = random_texts(10)
    job = Job(str(tiny.reference), str(tiny.packed), "served", JobOptions(**{"rank": 4, **options}))
    write_job(folder, job, texts, [n % 5 == 4 for n in range(len(texts))])


def lines(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def test_killed_worker_continues_and_a_finished_one_returns_at_once(
    tiny: TinyCheckpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hemostat_lab.adapters.build_process import main, read_results

    folder = tmp_path / "job"
    write(folder, tiny)
    assert read_results(folder) is None
    first = subprocess.Popen([*WORKER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    seen = []
    while not seen or seen[-1]["done"] < 5:  # of 6 steps for the adapter
        seen.append(json.loads(first.stdout.readline()))
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert read_results(folder) is None
    assert main(folder) == 0
    said = lines(capsys.readouterr().out)
    assert said[0] == {"stage": "statistics", "done": 4, "total": 6} or said[0]["done"] > 4, "not from the start"
    result = read_results(folder)
    assert result is not None
    profile, report = result
    assert said[-1] == {"done": True, "version": profile.version}
    assert report["held_out"]["prompts"] == 2
    assert report["tokens"] == sum(len(t) for n, t in enumerate(random_texts(10)) if n % 5 != 4)
    assert profile.model == "served"
    assert not (folder / "work").exists()
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.iterdir())
    assert main(folder) == 0, "finished: nothing is loaded"
    # A damaged result is no result.
    (folder / "profile.safetensors").write_bytes(profile.to_bytes()[:-1])
    assert read_results(folder) is None


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / "job.json").write_text('{"reference": 1}'), "is no job"),
        (lambda folder: (folder / "tokens.npz").write_bytes(b"PK"), "cannot be read"),
        (lambda folder: (folder / "tokens.npz").unlink(), "No such file"),
        (lambda folder: (folder / "job.json").write_text('{"reference": "/r", "compressed": "/c"}'), "no folder /r"),
    ],
)
def test_error_is_one_line(
    harm: Any, message: str, tiny: TinyCheckpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hemostat_lab.adapters.build_process import main

    write(tmp_path / "job", tiny)
    harm(tmp_path / "job")
    assert main(tmp_path / "job") == 1
    (said,) = lines(capsys.readouterr().out)
    assert message in said["error"]
    assert "\n" not in said["error"]
