"""The output embedding of a checkpoint, read without torch: W with logits = W h."""

from __future__ import annotations

import json
import struct
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
_DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


class EmbeddingError(HemostatError):
    """The checkpoint's output embedding cannot be read; the text names the file and the fix."""


def load(folder: Path, vocab_size: int) -> npt.NDArray[np.float32]:
    """W, float32 [vocab_size, d], of the safetensors checkpoint in `folder`; EmbeddingError."""
    try:
        name, file = _find(folder)
        header, start = _header(file)
        return _read(file, name, header[name], start, vocab_size)
    except OSError as error:
        raise EmbeddingError(f"{error.filename}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise EmbeddingError(f"{folder}: not a readable safetensors checkpoint ({error})") from None


def _find(folder: Path) -> tuple[str, Path]:
    """The tensor's name, and the file that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = {name: folder / file for name, file in json.loads(index.read_bytes())["weight_map"].items()}
    else:
        files = {name: file for file in sorted(folder.glob("*.safetensors")) for name in _header(file)[0]}
    if not files:
        raise EmbeddingError(f"{folder}: no .safetensors file in it; give a folder with the checkpoint in that format")
    tied = _tied(folder)
    endings = {True: (*INPUT_NAMES, *OUTPUT_NAMES), False: OUTPUT_NAMES, None: (*OUTPUT_NAMES, *INPUT_NAMES)}[tied]
    for ending in endings:
        for name in sorted(files, key=len):
            if name == ending or name.endswith("." + ending):
                return name, files[name]
    wanted = ", ".join(endings)
    raise EmbeddingError(f"{folder}: holds no output embedding under a known name ({wanted})")


def _tied(folder: Path) -> bool | None:
    """Whether the input embedding is also the output embedding; None where the configuration does not say."""
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


def _read(file: Path, name: str, entry: dict[str, Any], start: int, vocab_size: int) -> npt.NDArray[np.float32]:
    dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in _DTYPE_BYTES:
        raise EmbeddingError(f"{file}: {name} is {dtype}; {', '.join(_DTYPE_BYTES)} can be read")
    if len(shape) != 2 or shape[0] != vocab_size or shape[1] < 1:
        raise EmbeddingError(
            f"{file}: {name} has shape {shape}; the model has {vocab_size} ids: give its own checkpoint"
        )
    rows, columns = shape
    width = _DTYPE_BYTES[dtype]
    if last - first != rows * columns * width or file.stat().st_size < start + last:
        raise EmbeddingError(f"{file}: {name} is truncated; fetch the checkpoint again")
    weight = np.empty((rows, columns), np.float32)
    step = max(1, CHUNK_BYTES // (columns * width))
    with file.open("rb") as stream:
        stream.seek(start + first)
        for row in range(0, rows, step):
            here = weight[row : row + step]
            here[:] = _floats(stream.read(here.size * width), dtype).reshape(here.shape)
    if not np.isfinite(weight).all():
        raise EmbeddingError(f"{file}: {name} holds NaN or an infinity")
    return weight


def _floats(data: bytes, dtype: str) -> npt.NDArray[Any]:
    if dtype == "BF16":
        # The upper half of a float32.
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, "<f2" if dtype == "F16" else "<f4")
