"""Safetensors files written tensor by tensor, for checkpoints that are larger than the memory."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any, BinaryIO

import torch

from hemostat_lab.models.checkpoint import INDEX

MAX_FILE_BYTES = 5 << 30
"""The largest size of a file in bytes, as in transformers."""
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_ALIGNMENT = 8


class TensorFiles:
    """The weights of one checkpoint folder: `model.safetensors`, or several files and their index.

    Tensors are first collected in a file for each size of element. Those files are joined, the largest size first, so
    that every tensor is aligned.
    """

    def __init__(self, folder: Path, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self._folder = folder
        self._max_file_bytes = max_file_bytes
        self._data: dict[int, BinaryIO] = {}
        self._tensors: dict[int, list[tuple[str, str, list[int], int]]] = defaultdict(list)
        """Size of element -> name, type, shape, bytes."""
        self._bytes = 0
        self._written: list[Path] = []
        self._file_of: dict[str, int] = {}
        self.total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        if self._bytes and self._bytes + len(data) > self._max_file_bytes:
            self._close_file()
        size = tensor.element_size()
        if size not in self._data:
            self._data[size] = self._collected(size).open("wb")
        data.tofile(self._data[size])
        self._tensors[size].append((name, _NAMES[tensor.dtype], list(tensor.shape), len(data)))
        self._file_of[name] = len(self._written)
        self._bytes += len(data)
        self.total_bytes += len(data)

    def close(self) -> None:
        """Every file is complete under its final name."""
        self._close_file()
        count = len(self._written)
        if count == 1:
            self._written[0].rename(self._folder / "model.safetensors")
            return
        names = [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
        for path, name in zip(self._written, names, strict=True):
            path.rename(self._folder / name)
        index = {
            "metadata": {"total_size": self.total_bytes},
            "weight_map": {name: names[file] for name, file in sorted(self._file_of.items())},
        }
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _close_file(self) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for size in sorted(self._tensors, reverse=True):
            for name, kind, shape, length in self._tensors[size]:
                header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, begin + length]}
                begin += length
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        path = self._folder / f"weights-{len(self._written)}.part"
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for size in sorted(self._tensors, reverse=True):
                self._data[size].close()
                with self._collected(size).open("rb") as collected:
                    shutil.copyfileobj(collected, file)
                self._collected(size).unlink()
        self._written.append(path)
        self._data.clear()
        self._tensors.clear()
        self._bytes = 0

    def _collected(self, size: int) -> Path:
        return self._folder / f"elements-of-{size}.part"
