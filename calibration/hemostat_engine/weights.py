"""A fingerprint of the weights that the engine loads, so that other ones under the same path are noticed.

It is the same for every copy of a checkpoint: times of files, which differ from machine to machine, do not enter. Of
large files only samples are read; a change that leaves names, sizes and all samples as they were is not noticed.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

log = logging.getLogger("hemostat.engine")

WEIGHT_SUFFIXES = frozenset((".safetensors", ".bin", ".pt", ".pth", ".gguf"))
CONFIGURATION = frozenset(("config.json", "quantize_config.json", "hf_quant_config.json"))
INDEX_SUFFIX = ".index.json"
MAX_FILES = 1024
"""The largest number of files: there is no fingerprint of more."""
BLOCK_BYTES = 64 * 1024
BLOCKS = 256
"""The number of blocks that are read of all files together, evenly spaced in each: 16 MiB. At least two blocks of each
file are read, its first and its last one.
"""
MAX_MODEL_CHARACTERS = 256
_COMMIT = re.compile(r"[0-9a-f]{40}")


def fingerprint(model: str, commit: str | None = None) -> str:
    """Returns 32 hexadecimal digits for the weights in a folder or a file; of weights that were fetched from the hub,
    by their commit; "" if neither is known. Raises OSError if a file cannot be read.

    model: path, or name on the hub. commit: of the hub, where known.
    """
    path = Path(model)
    if path.is_dir():
        real = path.resolve()
        if real.parent.name == "snapshots" and _COMMIT.fullmatch(real.name):
            return _digest(real.name)  # of the hub's cache: the same as where the path is the model's name
        files = sorted(file for file in path.iterdir() if _counts(file.name) and file.is_file())
    else:
        files = [path] if path.is_file() else []
    if any(file.suffix in WEIGHT_SUFFIXES for file in files):
        return _of_files(files) if len(files) <= MAX_FILES else ""
    return _digest(commit) if commit and not path.exists() else ""


def _counts(name: str) -> bool:
    return name in CONFIGURATION or name.endswith(INDEX_SUFFIX) or Path(name).suffix in WEIGHT_SUFFIXES


def _digest(commit: str) -> str:
    return hashlib.blake2b(f"commit {commit}".encode(), digest_size=16).hexdigest()


def _of_files(files: list[Path]) -> str:
    whole = hashlib.blake2b(digest_size=16)
    blocks = max(2, BLOCKS // len(files))
    for path in files:
        size = path.stat().st_size
        whole.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for block in _samples(file, size, blocks):
                whole.update(block)
    return whole.hexdigest()


def _samples(file: BinaryIO, size: int, blocks: int) -> Iterator[bytes]:
    """Yields the whole file where it is not larger than the samples."""
    if size <= blocks * BLOCK_BYTES:
        yield file.read(blocks * BLOCK_BYTES)
        return
    for n in range(blocks):
        file.seek((size - BLOCK_BYTES) * n // (blocks - 1))
        yield file.read(BLOCK_BYTES)


def _attribute(owner: Any, name: str) -> Any:
    """Returns an attribute; None if there is none, or it cannot be computed: the engine must start all the same."""
    try:
        return getattr(owner, name, None)
    except Exception:  # noqa: BLE001  whatever a property of a later version raises
        return None


class LoadedWeights:
    """Computes the fingerprint once, in a thread of its own: neither decoding nor a report waits for the file system.

    model: the engine's first served name. path, commit: see `fingerprint`.
    """

    def __init__(self, model: str = "", path: str = "", commit: str | None = None) -> None:
        self.model = model
        self._path = path
        self._commit = commit
        self._found = ""

    @classmethod
    def of(cls, model_config: Any) -> LoadedWeights:
        """Returns the weights that vLLM's ModelConfig names. What a version of vLLM does not say is not known: it never
        raises.
        """
        names = _attribute(model_config, "served_model_name")
        name = names[0] if isinstance(names, list) and names else names
        path = _attribute(model_config, "model")
        commit = _attribute(_attribute(model_config, "hf_config"), "_commit_hash")
        if not isinstance(name, str) or not isinstance(path, str) or len(name) > MAX_MODEL_CHARACTERS:
            return cls()
        return cls(name, path, commit if isinstance(commit, str) else None)

    def start(self) -> None:
        if self._path:
            threading.Thread(target=self._compute, name="hemostat-weights", daemon=True).start()

    def report(self) -> dict[str, str]:
        """Returns the members `model` and `weights` of a report; none where there is no fingerprint (yet)."""
        return {"model": self.model, "weights": self._found} if self._found else {}

    def _compute(self) -> None:
        try:
            self._found = fingerprint(self._path, self._commit)
        except (OSError, ValueError) as error:
            log.warning("the weights in %s have no fingerprint: %s", self._path, error)
