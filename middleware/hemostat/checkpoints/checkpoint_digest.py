"""The digest of a checkpoint's files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

MAX_HASHED_BYTES = 64 * 1024 * 1024
"""The size in bytes up to which a file is hashed as a whole. Only evenly spaced samples of larger files enter the
digest: hashing 100 GB would delay the start."""
SAMPLES = 64
SAMPLE_BYTES = 1024 * 1024


def checkpoint_digest(model: str, commit: str | None) -> str:
    """Identifies the weights: the hub's commit, or a hash over the folder's files (large ones by samples)."""
    folder = Path(model)
    if not folder.is_dir():
        return hashlib.sha256(f"{model}@{commit}".encode()).hexdigest()[:32]
    whole = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file():
            size = path.stat().st_size
            whole.update(f"{path.name}\0{size}\0".encode())
            with path.open("rb") as file:
                for block in _blocks(file, size):
                    whole.update(block)
    return whole.hexdigest()[:32]


def _blocks(file: BinaryIO, size: int) -> Iterator[bytes]:
    if size <= MAX_HASHED_BYTES:
        while block := file.read(SAMPLE_BYTES):
            yield block
        return
    for n in range(SAMPLES):
        file.seek((size - SAMPLE_BYTES) * n // (SAMPLES - 1))
        yield file.read(SAMPLE_BYTES)
