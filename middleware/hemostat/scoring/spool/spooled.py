"""A capture as the spool keeps it: with what the engine reported of it, and when and how probably it was admitted."""

from __future__ import annotations

import msgspec
import numpy as np

from hemostat.engines.messages import TapRun
from hemostat.engines.taps import TapResult
from hemostat.ipc.messages import Capture


class SpooledTap(msgspec.Struct, frozen=True):
    """The numbers that the engine reported of a capture (`TapResult`), without the features at anchors."""

    boot_id: str
    applied: str | None
    mixed: bool
    log_normalizer: dict[str, bytes]
    """The values by version, little-endian float64 [T]."""
    runs: list[TapRun] = []
    """The runs, if they say which ids a grammar allowed; without their other numbers."""

    @classmethod
    def of(cls, tap: TapResult) -> SpooledTap:
        runs = [
            msgspec.structs.replace(run, versions={}, anchors=None, features=None, previous_ids=None)
            for run in tap.runs
        ]
        numbers = {version: values.astype("<f8").tobytes() for version, values in tap.log_normalizer.items()}
        has_sets = any(run.set_rows for run in runs)
        return cls(tap.boot_id, tap.applied, tap.mixed, numbers, runs if has_sets else [])

    @property
    def size(self) -> int:
        """The bytes of the numbers and of the sets of ids."""
        sets = sum(len(run.set_rows) + len(run.sets) for run in self.runs)
        return sets + sum(map(len, self.log_normalizer.values()))

    def result(self) -> TapResult:
        """Returns what the stages of scoring read."""
        numbers = {
            version: np.frombuffer(values, "<f8").astype(np.float64) for version, values in self.log_normalizer.items()
        }
        return TapResult(self.boot_id, self.applied, self.mixed, numbers, None, self.runs)


class Spooled(msgspec.Struct, frozen=True):
    """One capture in the spool."""

    capture: Capture
    at: float
    """The Unix time at which it was admitted, in seconds."""
    probability: float = 1.0
    """The probability with which it was admitted, above 0: below 1 only while the spool is more than half full."""
    tap: SpooledTap | None = None
    """None if the engine reported nothing."""
