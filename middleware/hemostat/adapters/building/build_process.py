"""`python -m hemostat.adapters.building.build_process JOBFOLDER [PARENT_PID]`: `build` in a process of its own.

The folder holds `job.json` (a `Job`) and `tokens.npz` (`write_job` writes both). Finished parts are kept in its folder
`work`: what is killed at any moment and started again goes on. Results are `profile.safetensors` and then
`report.json`, each complete or absent: with `report.json` the job is finished, and a second start returns at once.

Standard output: JSON lines, `{"stage", "done", "total"}`, at the end `{"done": true, "version"}` with exit code 0, or
`{"error"}`, one line for people, with exit code 1. With PARENT_PID the process is killed when that process ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from hemostat.config.install_command import install_command
from hemostat.ipc.supervised import die_with_parent
from hemostat.models.errors import AdaptError
from hemostat.models.texts import Text
from hemostat.models.work_folder import WorkFolder, write_atomically
from hemostat_calibration.errors import HemostatError
from hemostat_calibration.profiles.profile import CalibrationProfile

NICENESS = 10
"""As the reference: building yields the processor to whatever serves clients. Beside a process of niceness 0 that is
always busy, Linux gives 10 about a tenth of a core, and 19 a sixty-eighth, in which a build of one minute takes an
hour."""
JOB_FILE = "job.json"
TOKENS_FILE = "tokens.npz"
PROFILE_FILE = "profile.safetensors"
REPORT_FILE = "report.json"


class JobOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """device: of torch. distil: train the adapter further. The others: `build.BuildOptions`."""

    rank: int = 16
    max_rank: int | None = None
    shared_out: bool = False
    metric: str = "auto"
    memory_mib: int = 4096
    device: str = "cpu"
    distil: bool = False
    seed: int = 0


class Job(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """reference, compressed: checkpoint folders. model: of the profile."""

    reference: str
    compressed: str
    model: str = ""
    options: JobOptions = JobOptions()


def write_job(folder: Path, job: Job, texts: Sequence[Text], held_out: Sequence[bool]) -> None:
    """Make a job of `texts`; those of `held_out` are judged on, not learned from. Raises OSError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    tokens = io.BytesIO()
    np.savez(
        tokens,
        ids=np.concatenate([text.ids for text in texts]).astype(np.int32),
        prompt_lengths=np.array([len(text.prompt) for text in texts], np.int32),
        lengths=np.array([len(text) for text in texts], np.int32),
        held_out=np.array(held_out, np.bool_),
    )
    write_atomically(folder / TOKENS_FILE, tokens.getvalue())
    write_atomically(folder / JOB_FILE, msgspec.json.encode(job))


def read_results(folder: Path) -> tuple[CalibrationProfile, dict[str, Any]] | None:
    """Profile and report of a finished job; None where it is not finished, or a file is damaged."""
    try:
        report = json.loads((folder / REPORT_FILE).read_bytes())
        profile = CalibrationProfile.from_bytes((folder / PROFILE_FILE).read_bytes(), report["version"])
    except (OSError, ValueError, KeyError, TypeError, HemostatError):
        return None
    return profile, report


def main(folder: Path) -> int:
    try:
        version = _run(folder)
    except HemostatError as error:
        _say({"error": " ".join(str(error).split())})
        return 1
    except ImportError as error:
        _say({"error": f"{error}; adapters need: {install_command('adapters')}"})
        return 1
    except MemoryError:
        _say({"error": "out of memory: lower adapter.memory_mib, or the number of tokens"})
        return 1
    except OSError as error:
        _say({"error": f"{error.filename or folder}: {error.strerror or error}"})
        return 1
    _say({"done": True, "version": version})
    return 0


def _run(folder: Path) -> str:
    finished = read_results(folder)
    if finished is not None:
        return finished[0].version
    try:
        job = msgspec.json.decode((folder / JOB_FILE).read_bytes(), type=Job)
    except msgspec.DecodeError as error:
        raise AdaptError(f"{folder / JOB_FILE} is no job: {error}") from None
    learn, held = _texts(folder / TOKENS_FILE)
    from hemostat.adapters.building.build import BuildOptions, build, judged  # noqa: PLC0415  torch
    from hemostat.adapters.building.pair import CheckpointPair  # noqa: PLC0415
    from hemostat.models.parts import Parts  # noqa: PLC0415

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
            from hemostat.adapters.building.distil import distilled  # noqa: PLC0415  torch

            built = distilled(pair, built, learn, parts, seed=asked.seed, progress=progress)
        if held:
            built, _ = judged(pair, built, held, parts, progress)
        write_atomically(folder / PROFILE_FILE, built.profile.to_bytes())
        write_atomically(folder / REPORT_FILE, json.dumps(built.report, allow_nan=False).encode())
        work.remove()
    return built.profile.version


def _texts(path: Path) -> tuple[list[Text], list[Text]]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            ids, prompts, lengths, held = (arrays[n] for n in ("ids", "prompt_lengths", "lengths", "held_out"))
    except (ValueError, KeyError, EOFError) as error:
        raise AdaptError(f"{path} cannot be read: {error}") from None
    if not len(prompts) == len(lengths) == len(held) or int(lengths.sum()) != len(ids) or (prompts > lengths).any():
        raise AdaptError(f"{path}: the lengths do not fit the token ids")
    learn: list[Text] = []
    judge: list[Text] = []
    for text, is_held in zip(_cut(ids.astype(np.int32), prompts, lengths), held.tolist(), strict=True):
        (judge if is_held else learn).append(text)
    return [text for text in learn if len(text) > 1], [text for text in judge if len(text.prompt) and len(text.output)]


def _cut(ids: npt.NDArray[np.int32], prompts: npt.NDArray[np.int32], lengths: npt.NDArray[np.int32]) -> Iterator[Text]:
    start = 0
    for prompt, length in zip(prompts.tolist(), lengths.tolist(), strict=True):
        yield Text(ids[start : start + prompt], ids[start + prompt : start + length])
        start += length


def _say(line: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    if len(sys.argv) > 2:
        die_with_parent(int(sys.argv[2]), signal.SIGKILL)
    os.nice(NICENESS)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main(Path(sys.argv[1])))
