"""The LoRA side of a fake vLLM: slots, names, the routes to load and unload, a resolver, and two defects of real ones.

Words and status codes are those of vLLM 0.32 (`entrypoints/openai/models/serving.py`, `entrypoints/serve/lora`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hemostat_engine.adapters.state import LORA_OFF

NO_VERSION = "0" * 32
"""The plugin's resolver refuses this name."""
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@dataclass
class FakeLora:
    """A server that was started with --enable-lora. Fields may be set at any time."""

    slots: int = 2
    """--max-loras."""
    max_rank: int = 64
    """--max-lora-rank."""
    updating: bool = True
    """VLLM_ALLOW_RUNTIME_LORA_UPDATING: the routes exist, and unknown names are given to resolvers."""
    resolves: dict[str, int] = field(default_factory=dict)
    """Version -> rank: what the resolver of Hemostat's general plugin can fetch."""
    enabled: bool = True
    """Off: the server was started without --enable-lora; resolver and routes exist all the same."""
    shows_metrics: bool = True
    """Off: a router's metrics are in the place of vLLM's."""
    grouped: bool = False
    """Rows without an adapter are left alone; off: in a batch with adapter rows they get the last slot's adapter."""
    unload_frees: bool = True
    """Unloading frees the slot, as with Hemostat's general plugin; off: it only forgets the name."""
    sees_folders: bool = True
    """The server sees the folders that adapters are loaded from."""
    strength: float = 1.0
    """Of the effect on the logits."""
    scale: dict[str, float] = field(default_factory=dict)
    """By version: a factor of the effect that a correct engine would not have."""
    swapped: dict[str, str] = field(default_factory=dict)
    """By version: another one, whose weights it has."""
    broken: set[str] = field(default_factory=set)
    """Versions whose generations fail."""
    names: dict[str, str] = field(default_factory=dict)
    """Name -> path: what /v1/models lists."""
    in_slots: list[str | None] = field(default_factory=list)
    was_full: bool = False
    running: Counter[str] = field(default_factory=Counter)
    """Generations by adapter."""
    starts: int = 0
    """Of the server."""
    _used: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """As the server does: nothing is loaded."""
        self.names.clear()
        self.in_slots = [None] * self.slots
        self.was_full = False
        self.starts += 1
        self._used.clear()

    @property
    def loaded(self) -> list[str]:
        return [name for name in self.in_slots if name is not None]

    def _activate(self, name: str) -> None:
        """Give it a slot: a free one, else that of the one that was not used for longest."""
        if name not in self.in_slots:
            if None not in self.in_slots:
                oldest = next(used for used in self._used if used in self.in_slots)
                self.in_slots[self.in_slots.index(oldest)] = None
            self.in_slots[self.in_slots.index(None)] = name
        self._used = [*(used for used in self._used if used != name), name]
        self.was_full = self.was_full or None not in self.in_slots

    def _add(self, name: str, rank: int) -> str:
        """ "" or the engine's error."""
        if not self.enabled:
            return "LoRA is not enabled. Use --enable-lora to enable LoRA."
        if rank > self.max_rank:
            return f"LoRA rank {rank} is greater than max_lora_rank {self.max_rank}."
        self._activate(name)
        return ""

    def resolve(self, name: str) -> tuple[int, str]:
        """Status 0 where the name is an adapter now, else the status and text with which vLLM refuses it."""
        if name in self.names:
            if self.enabled:
                self._activate(name)
            return 0, ""
        if self.updating and self.resolves and name == NO_VERSION:
            return 400, "Hemostat's resolver is here; no adapter has this name: hemostat check asks for it"
        if not self.updating or name not in self.resolves:
            return 404, f"The model `{name}` does not exist."
        if not self.enabled:
            return 400, f"adapter {name} cannot be loaded: {LORA_OFF}"
        if self._add(name, self.resolves[name]):
            return 400, f"LoRA adapter '{name}' was found but could not be loaded."
        self.names[name] = f"/tmp/hemostat/{name}"
        return 0, ""

    def route(self, path: str, body: dict[str, Any]) -> tuple[int, str] | None:
        """Status and text of the two routes; None where they do not exist."""
        if not self.updating or path not in {LOAD, UNLOAD}:
            return None
        name = str(body.get("lora_name", ""))
        if path == UNLOAD:
            if name not in self.names:
                return 404, f"The lora adapter '{name}' cannot be found."
            del self.names[name]
            if self.unload_frees and name in self.in_slots:
                self.in_slots[self.in_slots.index(name)] = None
            return 200, f"Success: LoRA adapter '{name}' removed successfully."
        if name in self.names:
            return 400, f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, "
        if not (name and body.get("lora_path")):
            return 400, "Both 'lora_name' and 'lora_path' must be provided."
        folder = Path(str(body.get("lora_path", "")))
        if self.enabled and not (self.sees_folders and (folder / "adapter_config.json").is_file()):
            return 404, f"Loading lora {name} failed: No adapter found for {folder}"
        rank = json.loads((folder / "adapter_config.json").read_text())["r"] if self.enabled else 0
        if error := self._add(name, rank):
            return 500, error
        self.names[name] = str(folder)
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def metrics(self) -> str:
        """vLLM's own, of a server that has answered requests."""
        if not self.shows_metrics:
            return ""
        labels = f'max_lora="{self.slots}",running_lora_adapters="",waiting_lora_adapters=""'
        text = f"# TYPE process_start_time_seconds gauge\nprocess_start_time_seconds 1.79570{self.starts}e+09\n"
        text += "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 0.0\n"
        if self.enabled:
            text += f"# TYPE vllm:lora_requests_info gauge\nvllm:lora_requests_info{{{labels}}} 1.0\n"
        return text

    @contextmanager
    def generation(self, name: str) -> Iterator[None]:
        """A generation under this name: while it runs, its rows are in the batches."""
        counted = name in self.names
        self.running[name] += counted
        try:
            yield
        finally:
            self.running[name] -= counted

    def applied(self, name: str) -> str | None:
        """The adapter of a row of this name now."""
        if name in self.names:
            return self.swapped.get(name, name)
        mixed = not self.grouped and +self.running
        return self.in_slots[-1] if mixed else None

    def effect(self, version: str, context: list[int], size: int) -> npt.NDArray[np.float64]:
        """float64 [size]: what the adapter adds to the logits after these tokens."""
        key = np.asarray(context[-4:], "<i4").tobytes()
        digest = blake2b(key, digest_size=16, key=version.encode()[:64], person=b"adapter").digest()
        drawn = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little"))).standard_normal(size)
        return self.strength * self.scale.get(version, 1.0) * drawn
