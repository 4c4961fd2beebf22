"""The adapters that a worker's LoRA manager has loaded. The engine's thread writes it, the agent's reads it.

`state` is this process's; without --enable-lora or without the general plugin it stays empty.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from typing import Any

from hemostat_calibration.profiles.profile import VERSION_PATTERN

MAX_VERSIONS = 64
PROBE = "0" * 32
"""The resolver refuses this name in words of its own, by which `hemostat check` recognizes the plugin."""
LORA_OFF = "LoRA is not enabled: start vLLM with --enable-lora"
"""The text that says why adapters are off. Hemostat recognizes "not enabled" in a refusal, and vLLM says the same."""


class AdapterState:
    """The state of adapters in this worker. grouped: the CPU's operations are Hemostat's. wanted: versions that
    Hemostat asks every engine to hold.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._report: dict[str, Any] = {}
        self._counts: Counter[str] = Counter()
        self._was_full = False
        self.grouped = False
        self.wanted: frozenset[str] = frozenset()

    def want(self, versions: Iterable[str]) -> None:
        self.wanted = frozenset(versions)

    def set_loaded(self, names: Iterable[str | None], slots: int, max_rank: int) -> None:
        """Notes which adapters are loaded. names: the names of the adapters in slots, with None in place of the ones
        that failed to load.
        """
        names = list(names)
        self._was_full |= len(names) >= slots
        versions = sorted({name for name in names if name and VERSION_PATTERN.fullmatch(name)})
        lora = {
            "slots": slots,
            "max_rank": max_rank,
            "grouped": self.grouped,
            "loaded": len(names),
            "was_full": self._was_full,
        }
        with self._lock:
            self._report = {"adapters": versions[:MAX_VERSIONS], "lora": lora}

    def add(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    def report(self) -> dict[str, Any]:
        """Returns the members `adapters` and `lora` of a report; empty when no manager of this process is known."""
        with self._lock:
            return dict(self._report)

    def counters(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)


state = AdapterState()
