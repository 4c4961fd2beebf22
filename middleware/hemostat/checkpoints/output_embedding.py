"""The output embedding of a checkpoint, read without torch: W with logits = W h."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hemostat_calibration.errors import HemostatError

OUTPUT_NAMES = ("lm_head.weight", "embed_out.weight", "output.weight")
INPUT_NAMES = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
)
"""Ends of tensor names, the most common first. A model without an output embedding of its own uses the input's."""
MAX_HEADER_BYTES = 100 * 1024 * 1024
CHUNK_BYTES = 64 * 1024 * 1024
_LENGTH = struct.Struct("<Q")
_DTYPES: dict[str, np.dtype[Any]] = {"BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}


class EmbeddingError(HemostatError):
    """The checkpoint's output embedding cannot be read; the text names the file and the fix."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """The place of a tensor in a safetensors file. shape: the shape as stored. start: the offset of its first byte in
    the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    def memory_map(self, rows: int) -> npt.NDArray[Any]:
        """The first `rows` rows as stored: float32, float16, or for bfloat16 its bits as uint16. It takes no memory but
        the page cache's. Nothing is written to the file (torch takes writable arrays only)."""
        mapped: npt.NDArray[Any] = np.memmap(self.file, _DTYPES[self.dtype], "c", self.start, (rows, *self.shape[1:]))
        return mapped


@dataclass(frozen=True, slots=True)
class OutputEmbedding:
    """The output embedding of a checkpoint. weight: at least [V, d]. bias: at least [V]; None: it has none."""

    weight: StoredTensor
    bias: StoredTensor | None


def load(folder: Path, vocab_size: int) -> npt.NDArray[np.float32]:
    """W, float32 [vocab_size, d], of the safetensors checkpoint in `folder`; EmbeddingError."""
    stored = find(folder, vocab_size).weight
    try:
        raw = stored.memory_map(vocab_size)
        weight = np.empty(raw.shape, np.float32)
        step = max(1, CHUNK_BYTES // (raw.shape[1] * raw.itemsize))
        for row in range(0, vocab_size, step):
            weight[row : row + step] = floats(raw[row : row + step])
    except OSError as error:
        raise EmbeddingError(f"{stored.file}: cannot be read ({error.strerror})") from None
    if not np.isfinite(weight).all():
        raise EmbeddingError(f"{stored.file}: {stored.name} holds NaN or an infinity")
    return weight


def find(folder: Path, vocab_size: int) -> OutputEmbedding:
    """The output embedding of the safetensors checkpoint in `folder`, checked but not read; EmbeddingError.

    Rows above `vocab_size` are accepted where the folder's own config.json says `vocab_size`: they are padding.
    """
    try:
        tensors = _tensors(folder)
        weight = _stored(*_output(folder, tensors))
        _check(weight, vocab_size, 2, padded=vocabulary(read_config(folder)) == vocab_size)
        name = weight.name.removesuffix("weight") + "bias"
        bias = None
        if name in tensors:
            bias = _stored(name, tensors[name])
            _check(bias, vocab_size, 1, padded=bias.shape[0] == weight.shape[0])
        return OutputEmbedding(weight, bias)
    except OSError as error:
        raise EmbeddingError(f"{error.filename}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise EmbeddingError(f"{folder}: not a readable safetensors checkpoint ({error})") from None


def read_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's config.json, the text model's part of it on top; {} where there is none. ValueError."""
    file = folder / "config.json"
    if not file.is_file():
        return {}
    config = json.loads(file.read_bytes())
    if not isinstance(config, dict):
        raise ValueError("config.json is no mapping")
    return config | (config.get("text_config") or {})


def vocabulary(config: dict[str, Any]) -> int | None:
    """The number of ids; None where the configuration does not say."""
    size = config.get("vocab_size")
    return size if isinstance(size, int) and size > 0 else None


def _tensors(folder: Path) -> dict[str, Path]:
    """Name -> file."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = {name: folder / file for name, file in json.loads(index.read_bytes())["weight_map"].items()}
    else:
        files = {name: file for file in sorted(folder.glob("*.safetensors")) for name in _header(file)[0]}
    if not files:
        raise EmbeddingError(f"{folder}: no .safetensors file in it; give a folder with the checkpoint in that format")
    return files


def _output(folder: Path, files: dict[str, Path]) -> tuple[str, Path]:
    """The tensor's name, and the file that holds it."""
    tied = _tied(folder)
    endings = {True: (*INPUT_NAMES, *OUTPUT_NAMES), False: OUTPUT_NAMES, None: (*OUTPUT_NAMES, *INPUT_NAMES)}[tied]
    for ending in endings:
        for name in sorted(files, key=len):
            if name == ending or name.endswith("." + ending):
                return name, files[name]
    wanted = ", ".join(endings)
    raise EmbeddingError(f"{folder}: holds no output embedding under a known name ({wanted})")


def _tied(folder: Path) -> bool | None:
    """Returns True if the input embedding is also the output embedding; None if the configuration does not state it."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    config = json.loads(file.read_bytes())
    for part in (config, config.get("text_config") or {}):
        if "tie_word_embeddings" in part:
            return bool(part["tie_word_embeddings"])
    return None


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's table of tensors, and where their bytes begin."""
    with file.open("rb") as stream:
        (length,) = _LENGTH.unpack(stream.read(_LENGTH.size).ljust(_LENGTH.size, b"\xff"))
        if length > MAX_HEADER_BYTES:
            raise EmbeddingError(f"{file}: truncated, or not a safetensors file; fetch it again")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return header, _LENGTH.size + length


def _stored(name: str, file: Path) -> StoredTensor:
    header, start = _header(file)
    entry = header[name]
    dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if dtype not in _DTYPES:
        raise EmbeddingError(f"{file}: {name} is {dtype}; {', '.join(_DTYPES)} can be read")
    if last - first != math.prod(shape) * _DTYPES[dtype].itemsize or file.stat().st_size < start + last:
        raise EmbeddingError(f"{file}: {name} is truncated; fetch the checkpoint again")
    return StoredTensor(name, file, dtype, shape, start + first)


def _check(stored: StoredTensor, vocab_size: int, dimensions: int, *, padded: bool) -> None:
    """padded: more rows than `vocab_size` are padding."""
    shape = stored.shape
    fits = len(shape) == dimensions and min(shape) >= 1
    if not fits or not (shape[0] == vocab_size or (padded and shape[0] > vocab_size)):
        raise EmbeddingError(
            f"{stored.file}: {stored.name} has shape {list(shape)}; the model has {vocab_size} ids: give its own "
            "checkpoint"
        )


def floats(stored: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """float32 of what `StoredTensor.memory_map` gives.

    >>> floats(np.array([0x3F80, 0xC000], np.uint16)).tolist()
    [1.0, -2.0]
    """
    if stored.dtype == np.uint16:
        # bfloat16 is the upper half of a float32.
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32)
