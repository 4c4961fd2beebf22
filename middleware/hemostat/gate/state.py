"""The evidence so far in a file: a line for what is compared, a line for each unit, and a line for
the units of each kind that are planned, whenever there are more.

A line is written whole and synced before the next unit counts. A last line that is cut off, as after a kill, is left
out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import msgspec

from hemostat.gate.unit import Unit
from hemostat.reference.identity import Identity
from hemostat.reference.match import MAX_SAME_NATS
from hemostat_calibration.errors import HemostatError

FORMAT = 2
_PLANNED = b'{"planned":'


class StateError(HemostatError):
    """One line with the file and the correction."""


class Header(msgspec.Struct, frozen=True):
    """The subject of the evidence."""

    format: int
    expect: str
    stable: Identity
    candidate: Identity
    reference: str
    margin: float
    kind_margin: float
    alpha: float
    outcomes: dict[str, float] = {}
    """The margin of each question about what clients get."""


class _Line(msgspec.Struct, frozen=True):
    unit: str
    kind: str
    excess: dict[str, float]
    note: str = ""
    log_ratio: float | None = None


class _Planned(msgspec.Struct, frozen=True):
    planned: dict[str, int]
    applying: dict[str, dict[str, int]] = {}


class Evidence:
    """Owns the file; without a path, nothing is kept. It is a context, which closes the file.

    units: what was measured, and in which kind, by the prompt's digest. All of it counts, also where the prompt is not
    in the file of prompts any more: what has been seen cannot be taken back.
    """

    def __init__(self, path: Path | None, header: Header) -> None:
        self.units: dict[str, tuple[str, Unit]] = {}
        self._planned = _Planned({})
        self._file: BinaryIO | None = None
        if path is None:
            return
        try:
            data = path.read_bytes() if path.exists() else b""
            whole = data[: data.rfind(b"\n") + 1]
            if whole:
                self._read(path, whole, header)
            self._file = path.open("r+b" if path.exists() else "x+b")
            os.chmod(path, 0o600)
            self._file.truncate(len(whole))
            self._file.seek(len(whole))
        except OSError as error:
            raise StateError(f"--state: {path} cannot be used ({error.strerror}); name another file") from None
        if not whole:
            self._write(header)

    def __enter__(self) -> Evidence:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def plan(
        self, planned: Mapping[str, int], applying: Mapping[str, Mapping[str, int]]
    ) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
        """Returns the largest number of units of each kind that any run has planned, and keeps it: a kind that had to
        pass still has to if its other prompts are taken out of the file. applying: the same by question, of those that
        do not apply to all units."""
        before = self._planned
        most = _Planned(
            _most(before.planned, planned),
            {
                name: _most(before.applying.get(name, {}), applying.get(name, {}))
                for name in {**before.applying, **applying}
            },
        )
        if most != before:
            self._planned = most
            self._write(most)
        return most.planned, most.applying

    def update(self, digest: str, kind: str, unit: Unit) -> None:
        self.units[digest] = kind, unit
        self._write(_Line(digest, kind, unit.excess, unit.note, unit.log_ratio))

    def _read(self, path: Path, data: bytes, header: Header) -> None:
        try:
            first, *lines = data.splitlines()
            before = msgspec.json.decode(first, type=Header)
            plans = [line for line in lines if line.startswith(_PLANNED)]
            measured = [msgspec.json.decode(line, type=_Line) for line in lines if not line.startswith(_PLANNED)]
            if plans:
                self._planned = msgspec.json.decode(plans[-1], type=_Planned)
        except msgspec.DecodeError as error:
            raise StateError(f"--state: {path} is not a file of this command ({error}); name another one") from None
        if changes := _changes(before, header):
            raise StateError(
                f"--state: {path} has evidence of something else ({'; '.join(changes)}), and evidence of one candidate "
                "is none of another; name another file"
            )
        self.units = {line.unit: (line.kind, Unit(line.excess, line.note, line.log_ratio)) for line in measured}

    def _write(self, line: Header | _Line | _Planned) -> None:
        if self._file is not None:
            self._file.write(msgspec.json.encode(line) + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())


def _most(before: Mapping[str, int], now: Mapping[str, int]) -> dict[str, int]:
    return {kind: max(before.get(kind, 0), now.get(kind, 0)) for kind in (*before, *(set(now) - set(before)))}


def _changes(before: Header, now: Header) -> list[str]:
    changes = [f"the candidate: {text}" for text in before.candidate.differences(now.candidate, MAX_SAME_NATS)]
    changes += [f"the stable one: {text}" for text in before.stable.differences(now.stable, MAX_SAME_NATS)]
    for name in ("format", "expect", "reference", "margin", "kind_margin", "alpha", "outcomes"):
        if (then := getattr(before, name)) != (wanted := getattr(now, name)):
            changes.append(f"{name} is {wanted!r} in place of {then!r}")
    return changes
