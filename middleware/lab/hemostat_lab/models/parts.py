"""Finished parts of a build: tensors under names, on disk or in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from hemostat_lab.models.work_folder import WorkFolder


class Parts:
    """Tensors by part and name. In a work folder, where they survive the process; without one, in memory.

    prefix: of the parts' names in the folder, where it has other parts, too.
    """

    def __init__(self, folder: WorkFolder | None, prefix: str = "") -> None:
        self._folder = folder
        self._prefix = prefix
        self._memory: dict[str, dict[str, torch.Tensor]] = {}

    def get(self, part: str) -> dict[str, torch.Tensor] | None:
        """None if it is missing or damaged."""
        if self._folder is None:
            return self._memory.get(part)
        data = self._folder.get(self._prefix + part)
        if data is None:
            return None
        try:
            result: dict[str, torch.Tensor] = load(data)
        except SafetensorError:
            return None
        return result

    def put(self, part: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replaces the part. Raises WorkFolderError where it cannot be written."""
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        if self._folder is None:
            self._memory[part] = kept
        else:
            self._folder.put(self._prefix + part, save(kept))

    def drop(self, part: str) -> None:
        self._memory.pop(part, None)
        if self._folder is not None:
            self._folder.drop(self._prefix + part)

    def get_list(self, part: str) -> list[torch.Tensor] | None:
        """What `put_list` stored."""
        result = self.get(part)
        return None if result is None else [result[str(n)] for n in range(len(result))]

    def put_list(self, part: str, tensors: list[torch.Tensor]) -> None:
        self.put(part, {str(n): tensor for n, tensor in enumerate(tensors)})


def json_tensor(value: Any) -> torch.Tensor:
    """`value` as JSON, in a tensor: to be stored beside others. `json_value` is its inverse."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def json_value(tensor: torch.Tensor) -> Any:
    return json.loads(bytes(tensor.tolist()))
