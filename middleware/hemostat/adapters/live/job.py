"""The folder of one build: what its process reads and writes, private to this user, and deleted afterwards."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from hemostat.adapters.live import build_messages
from hemostat.adapters.live.folders import CheckpointFolders
from hemostat.checkpoints.texts import Text
from hemostat_calibration.errors import HemostatError
from hemostat_calibration.profiles.adapter import ADAPTER, adapter_layers
from hemostat_calibration.profiles.profile import CalibrationProfile

PREFIX = "hemostat-adapter-"
LOCK = "lock"
"""Locked while the folder is in use."""
HELD_OUT_EVERY = 8
"""One of so many texts is not learned from: the report's own figures are of these."""
MIN_TEXTS_TO_HOLD_OUT = 16
MAX_PROFILE_BYTES = 2 << 30
MAX_REPORT_BYTES = 16 << 20


class InvalidResult(HemostatError):
    """The result of a build cannot be used; the text is one line."""


@dataclass(frozen=True, slots=True)
class Job:
    """The adapter to make, and the checkpoints and texts that it is made from.

    digests: of both checkpoints, reference first, as `checkpoint_digest` returns them.
    """

    folders: CheckpointFolders
    digests: tuple[str, str]
    model: str
    vocab_size: int
    texts: Sequence[Text] = field(repr=False)
    options: dict[str, Any]
    """`build_messages.JobOptions`."""

    @property
    def tokens(self) -> int:
        return sum(map(len, self.texts))


@dataclass(frozen=True, slots=True)
class Result:
    profile: CalibrationProfile
    report: dict[str, Any]


class JobFolder:
    """0700; locked by this process until it is deleted. OSError."""

    def __init__(self, job: Job) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        try:
            self._lock = os.open(self.path / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _write(self.path, job)
        except BaseException:
            shutil.rmtree(self.path, ignore_errors=True)
            raise

    def delete(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _write(folder: Path, job: Job) -> None:
    held_out = [n % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 for n in range(len(job.texts))]
    if len(job.texts) < MIN_TEXTS_TO_HOLD_OUT:
        held_out = [False] * len(job.texts)
    folders, options = job.folders, build_messages.JobOptions(**job.options)
    given = build_messages.Job(str(folders.reference), str(folders.compressed), job.model, options)
    build_messages.write_job(folder, given, job.texts, held_out)


def delete_left_behind() -> int:
    """Delete the folders of builds whose process, and the one that started it, were killed; how many there were."""
    result = 0
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if path.stat().st_uid != os.getuid():
                continue
            lock = os.open(path / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where another process uses it
                shutil.rmtree(path, ignore_errors=True)
                result += 1
            finally:
                os.close(lock)
    return result


def read_result(folder: Path, job: Job) -> Result:
    """Returns the worker's result, checked against the job and both checkpoints. Raises InvalidResult if it cannot be
    used."""
    try:
        report = json.loads(_bytes(folder / build_messages.REPORT_FILE, MAX_REPORT_BYTES))
        profile = CalibrationProfile.from_bytes(_bytes(folder / build_messages.PROFILE_FILE, MAX_PROFILE_BYTES))
        if not isinstance(report, dict):
            raise InvalidResult("report.json is not an object")
        _check(profile, report, job)
    except OSError as error:
        raise InvalidResult(f"{error.filename}: {error.strerror}") from None
    except ValueError as error:
        raise InvalidResult(f"report.json: {error}") from None
    except InvalidResult:
        raise
    except HemostatError as error:
        raise InvalidResult(str(error)) from None
    return Result(profile, report)


def _bytes(file: Path, most: int) -> bytes:
    if file.stat().st_size > most:
        raise InvalidResult(f"{file.name} has more than {most >> 20} MiB")
    return file.read_bytes()


def _check(profile: CalibrationProfile, report: dict[str, Any], job: Job) -> None:
    if profile.family != ADAPTER:
        raise InvalidResult(f"profile {profile.version} is of the family {profile.family}")
    if profile.version != report.get("version"):
        raise InvalidResult(f"profile {profile.version} is not the report's, {report.get('version')}")
    if (profile.model, profile.vocab_size) != (job.model, job.vocab_size):
        raise InvalidResult(f"it is for {profile.model} with {profile.vocab_size} ids, not for {job.model}")
    digests = (report.get("reference"), report.get("compressed"))
    for name, ours, theirs in zip(("reference", "compressed"), job.digests, digests, strict=True):
        if ours != theirs:
            raise InvalidResult(f"adapter.{name}: it was made from other weights than those in this folder now")
    shapes = linear_shapes(job.folders.reference)
    layers = adapter_layers(profile)
    if not layers:
        raise InvalidResult("it changes no layer")
    for name, factors in layers.items():
        shape = shapes.get(name)
        if shape != (factors.b.shape[0], factors.a.shape[1]):
            raise InvalidResult(f"{name}: the correction is {factors.b.shape[0]} by {factors.a.shape[1]}, not {shape}")
        if not (np.isfinite(factors.a).all() and np.isfinite(factors.b).all()):
            raise InvalidResult(f"{name}: the correction holds NaN or an infinity")


def linear_shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the linear layers of a checkpoint that is not compressed, by module. OSError,
    InvalidResult."""
    result: dict[str, tuple[int, int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safetensors.safe_open(file, framework="numpy") as opened:
                for key in opened.keys():  # noqa: SIM118  not a mapping
                    shape = opened.get_slice(key).get_shape()
                    if key.endswith(".weight") and len(shape) == 2:
                        result[key.removesuffix(".weight")] = (shape[0], shape[1])
        except safetensors.SafetensorError as error:
            raise InvalidResult(f"{file}: {error}") from None
    return result
