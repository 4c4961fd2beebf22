"""`python -m hemostat_lab.adapters.build_process JOBFOLDER [PARENT_PID]`: `build` in a process of its own.

The folder holds `job.json` (a `Job`) and `tokens.npz` (`write_job` writes both). Finished parts are kept in its folder
`work`: what is killed at any moment and started again goes on. Results are `profile.safetensors` and then
`report.json`, each complete or absent: with `report.json` the job is finished, and a second start returns at once.

Standard output: JSON lines, `{"stage", "done", "total"}`, at the end `{"done": true, "version"}` with exit code 0, or
`{"error"}`, one line for people, with exit code 1. With PARENT_PID the process is killed when that process ends.

`--check REFERENCE COMPRESSED DEVICE PARENT_PID` in place of the folder: whether an adapter can be made of both
checkpoints. It makes none; its one line is `{"notes": [...]}`, or `{"error"}` with exit code 1.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from hemostat.adapters.live.build_messages import JOB_FILE, PROFILE_FILE, REPORT_FILE, TOKENS_FILE, Job, read_texts
from hemostat.checkpoints.errors import AdaptError
from hemostat.config.packages import install_command
from hemostat.ipc.supervised import die_with_parent
from hemostat.report.written_files import write_atomically
from hemostat_calibration.errors import HemostatError
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_lab.models.work_folder import WorkFolder

NICENESS = 13
"""The niceness of the process: building yields the processor to whatever serves clients, to the reference (10) and to
the copies that judge adapters (12), so that scoring goes on. If a process of niceness 0 is always busy, Linux gives a
niceness of 13 about a twentieth of a core. It gives 19 a sixty-eighth, with which a build of one minute takes an hour.
"""


def read_results(folder: Path) -> tuple[CalibrationProfile, dict[str, Any]] | None:
    """Profile and report of a finished job; None where it is not finished, or a file is damaged."""
    try:
        report = json.loads((folder / REPORT_FILE).read_bytes())
        profile = CalibrationProfile.from_bytes((folder / PROFILE_FILE).read_bytes(), report["version"])
    except (OSError, ValueError, KeyError, TypeError, HemostatError):
        return None
    return profile, report


def main(folder: Path) -> int:
    """Make the adapter of a job; returns the exit code."""
    return _answered(lambda: {"done": True, "version": _run(folder)}, folder)


def check(reference: Path, compressed: Path, device: str) -> int:
    """Say what an adapter of both checkpoints does not correct, or why there can be none; returns the exit code."""

    def notes() -> dict[str, Any]:
        from hemostat_lab.adapters.pair import CheckpointPair  # noqa: PLC0415  torch

        return {"notes": CheckpointPair.open(reference, compressed, device).notes}

    return _answered(notes, compressed)


def _answered(work: Callable[[], dict[str, Any]], folder: Path) -> int:
    """Print what `work` returns, or the one line about its error. folder: named where an error names no file."""
    try:
        answer = work()
    except HemostatError as error:
        _say({"error": " ".join(str(error).split())})
        return 1
    except ImportError as error:
        _say({"error": f"{error}; adapters need: {install_command('lab')}"})
        return 1
    except MemoryError:
        _say({"error": "out of memory: lower adapter.memory_mib, or the number of tokens"})
        return 1
    except OSError as error:
        _say({"error": f"{error.filename or folder}: {error.strerror or error}"})
        return 1
    _say(answer)
    return 0


def _run(folder: Path) -> str:
    finished = read_results(folder)
    if finished is not None:
        return finished[0].version
    try:
        job = msgspec.json.decode((folder / JOB_FILE).read_bytes(), type=Job)
    except msgspec.DecodeError as error:
        raise AdaptError(f"{folder / JOB_FILE} is no job: {error}") from None
    learn, held = read_texts(folder / TOKENS_FILE)
    from hemostat_lab.adapters.build import BuildOptions, build, judged  # noqa: PLC0415  torch
    from hemostat_lab.adapters.pair import CheckpointPair  # noqa: PLC0415
    from hemostat_lab.models.parts import Parts  # noqa: PLC0415

    asked = job.options
    options = BuildOptions(
        rank=asked.rank,
        max_rank=asked.max_rank,
        shared_out=asked.shared_out,
        metric=asked.metric,  # type: ignore[arg-type]  # checked there
        memory_mib=asked.memory_mib,
        seed=asked.seed,
        model=job.model,
    )
    pair = CheckpointPair.open(Path(job.reference), Path(job.compressed), asked.device)
    key = {
        "job": msgspec.to_builtins(job),
        "tokens": hashlib.sha256((folder / TOKENS_FILE).read_bytes()).hexdigest(),
        "reference": pair.reference.digest(),
        "compressed": pair.compressed.digest(),
    }

    def progress(stage: str, done: int, total: int) -> None:
        _say({"stage": stage, "done": done, "total": total})

    with WorkFolder(folder / "work", key, "adapt", "job") as work:
        parts = Parts(work)
        built = build(pair, learn, options, parts, progress)
        if asked.distil:
            from hemostat_lab.adapters.distil import distilled  # noqa: PLC0415  torch

            built = distilled(pair, built, learn, parts, seed=asked.seed, progress=progress)
        if held:
            built, _ = judged(pair, built, held, parts, progress)
        write_atomically(folder / PROFILE_FILE, built.profile.to_bytes())
        write_atomically(folder / REPORT_FILE, json.dumps(built.report, allow_nan=False).encode())
        work.remove()
    return built.profile.version


def _say(line: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    os.nice(NICENESS)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if sys.argv[1] == "--check":
        die_with_parent(int(sys.argv[5]), signal.SIGKILL)
        sys.exit(check(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]))
    if len(sys.argv) > 2:
        die_with_parent(int(sys.argv[2]), signal.SIGKILL)
    sys.exit(main(Path(sys.argv[1])))
