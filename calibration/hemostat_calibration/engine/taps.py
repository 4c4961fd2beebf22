"""log E_c[e^Δz] of tapped rows, from the engine's thread to the agent's: bounded, and lossy by design."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hemostat_calibration.engine.library import Counters

STEPS_AT_MOST = 2048
"""Decoding steps that may wait for the agent; what comes on top is dropped and counted."""


@dataclass(frozen=True, slots=True)
class TappedRow:
    """row: column of the step's values; position: of the token in the output, None when only the device knows it."""

    row: int
    nonce: str
    applied: str | None
    position: int | None = None


@dataclass(frozen=True, slots=True)
class SlotTap:
    """A tapped request of model runner V2, whose rows and positions only the device knows."""

    nonce: str
    applied: str | None
    prompt_len: int


@dataclass(frozen=True, slots=True)
class Step:
    """One decoding step's numbers, perhaps still being copied to the host.

    values: float32 [versions, rows] on the host, nats.
    rows: who they belong to, when the host knows; else `slots` by slot, with `slot_of_row` and `pos` (int [rows]: the
    position of the token that the model was fed, in the whole sequence).
    """

    versions: tuple[str, ...]
    values: torch.Tensor
    rows: Sequence[TappedRow] = ()
    slots: dict[int, SlotTap] = field(default_factory=dict)
    slot_of_row: torch.Tensor | None = None
    pos: torch.Tensor | None = None
    copied: Any = None
    """The device's event after the copies, None when they were made at once."""

    def resolved(self) -> Iterable[tuple[TappedRow, int]]:
        """Every row with its position in the output."""
        if self.slot_of_row is None or self.pos is None:
            return [(row, row.position) for row in self.rows if row.position is not None]
        found = []
        for row, (slot, pos) in enumerate(zip(self.slot_of_row.tolist(), self.pos.tolist(), strict=True)):
            tap = self.slots.get(slot)
            if tap is not None and pos + 1 >= tap.prompt_len:
                found.append((TappedRow(row, tap.nonce, tap.applied), pos + 1 - tap.prompt_len))
        return found


class Taps:
    """A bounded queue of steps. `push` on the engine's thread never waits; `drain` on the agent's may."""

    def __init__(self, counters: Counters, at_most: int = STEPS_AT_MOST) -> None:
        self._steps: deque[Step] = deque()
        self._at_most = at_most
        self._counters = counters

    def __len__(self) -> int:
        return len(self._steps)

    def push(self, step: Step) -> None:
        if len(self._steps) >= self._at_most:
            self._counters.add("taps_dropped", len(step.rows) or len(step.slots))
            return
        self._steps.append(step)

    def drain(self, at_most: int) -> list[dict[str, Any]]:
        """Up to `at_most` steps as runs of consecutive positions: `{"nonce", "start", "tokens",
        "versions": {version: [nats or null]}, "applied"}`."""
        runs: list[dict[str, Any]] = []
        open_runs: dict[str, dict[str, Any]] = {}
        for _ in range(min(at_most, len(self._steps))):
            step = self._steps.popleft()
            if step.copied is not None:
                step.copied.synchronize()
            columns = step.values.T.tolist()
            for row, position in step.resolved():
                run = open_runs.get(row.nonce)
                if run is None or not _continues(run, row, position, step.versions):
                    run = {
                        "nonce": row.nonce,
                        "start": position,
                        "tokens": 0,
                        "versions": {version: [] for version in step.versions},
                        "applied": row.applied,
                    }
                    open_runs[row.nonce] = run
                    runs.append(run)
                for values, value in zip(run["versions"].values(), columns[row.row], strict=True):
                    # A model that says NaN must not make the message unreadable.
                    values.append(round(value, 9) if -1e6 < value < 1e6 else None)
                run["tokens"] += 1
        return runs


def _continues(run: dict[str, Any], row: TappedRow, position: int, versions: tuple[str, ...]) -> bool:
    return (
        position == run["start"] + run["tokens"]
        and row.applied == run["applied"]
        and tuple(run["versions"]) == versions
    )
