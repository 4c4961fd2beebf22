"""The tensors of one quantized weight, checked one by one before they are used."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import NoReturn, Protocol

import torch

from hemostat.checkpoints.errors import AdaptError
from hemostat_lab.models.skeleton import Inputs

COPY_AGAIN = "copy the checkpoint again"
WRONG_CONFIG = "its quantization_config is of another checkpoint, or the file is damaged; copy the checkpoint again"


class StoredLayer:
    """One linear layer of a checkpoint. Each of its tensors is read once.

    name: of the module. parts: the last parts of the names of its tensors, such as `qweight`.
    """

    def __init__(self, name: str, parts: Collection[str], read: Callable[[str], torch.Tensor], where: str) -> None:
        """read: a tensor by its last part. where: label and folder, for errors."""
        self.name = name
        self.parts = frozenset(parts)
        self._read = cache(read)
        self._where = where

    def tensor(
        self, part: str, types: Collection[torch.dtype], shape: tuple[int | None, ...] | None = None
    ) -> torch.Tensor:
        """AdaptError unless there is such a tensor, with one of the types and this shape; None: any length."""
        if part not in self.parts:
            raise AdaptError(f"{self._where} has no tensor {self.name}.{part}: it is incomplete; {COPY_AGAIN}")
        values = self._read(part)
        if values.dtype not in types:
            wanted = " or ".join(_type_name(dtype) for dtype in types)
            self.refuse(part, f"is {_type_name(values.dtype)}, and not {wanted}")
        if shape is not None and (
            values.ndim != len(shape) or any(n not in (None, have) for n, have in zip(shape, values.shape, strict=True))
        ):
            expected = ", ".join("any" if n is None else str(n) for n in shape)
            self.refuse(part, f"has the shape {list(values.shape)}, and not [{expected}]")
        return values

    def scales(self, part: str, shape: tuple[int | None, ...] | None = None) -> torch.Tensor:
        """Float32; AdaptError where one is not finite. AutoRound writes negative ones, too."""
        values = self.tensor(part, _FLOATS, shape).float()
        if not bool(values.isfinite().all()):
            self.refuse(part, "holds scales that are not finite", COPY_AGAIN)
        return values

    def number(self, part: str) -> float:
        """A scale that is the only element of its tensor."""
        value = self.scales(part)
        if value.numel() != 1 or float(value) <= 0.0:
            self.refuse(part, f"holds {value.numel()} numbers, and not one that is positive")
        return float(value)

    def refuse(self, part: str, problem: str, fix: str = WRONG_CONFIG) -> NoReturn:
        raise AdaptError(f"{self._where}: {self.name}.{part} {problem}: {fix}")

    def check_groups(self, part: str, inputs: int, group_size: int) -> int:
        """The number of groups."""
        if inputs % group_size:
            self.refuse(part, f"has {inputs} inputs, which groups of {group_size} do not divide")
        return inputs // group_size


class StoredFormat(Protocol):
    """How the layers of one checkpoint are stored, by its `quantization_config`.

    parts: last parts of the names of the tensors that a weight and the scales of its inputs are stored as.
    marks: those of them of which each quantized layer has one.
    """

    @property
    def parts(self) -> frozenset[str]: ...

    @property
    def marks(self) -> frozenset[str]: ...

    def weight(self, layer: StoredLayer) -> torch.Tensor:
        """Float32 [outputs, inputs]: what is stored, without further rounding. AdaptError."""

    def inputs(self, layer: StoredLayer) -> Inputs:
        """AdaptError where they are rounded in a way that is not supported."""


def member(values: Mapping[str, object], *names: str) -> object:
    """The first of the members that is there and not null; else None."""
    return next((values[name] for name in names if values.get(name) is not None), None)


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_FLOATS = tuple(
    getattr(torch, name)
    for name in ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e8m0fnu")
    if hasattr(torch, name)
)
