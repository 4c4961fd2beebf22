"""The output head of a checkpoint: the logits of hidden states, in float32.

The embedding stays as it is stored (a memory map; on a GPU a copy): V · d · 2 bytes for bfloat16. Blocks of it are
converted to float32 for every product, so that sums are float32's. bfloat16 times bfloat16 is exact in float32.

The map from W h to a model's logits, a scale and a soft cap, is read from its configuration. They are applied as vLLM
does it (`model_executor/layers/logits_processor.py` of 0.32, and the classes of the models there): logits = scale · cap
· tanh((W h + b) / cap), without a cap scale · (W h + b).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hemostat.checkpoints.output_embedding import EmbeddingError, find, floats, read_config, vocabulary
from hemostat_calibration.messages import in_words

if TYPE_CHECKING:
    import torch

Rows = npt.NDArray[np.float32]

_OF_LOGITS = re.compile(r"logit|lm_head|output_mult|mup|residual_to_output|final_soft")
"""The settings that may concern what follows the last hidden state."""
_ELSEWHERE = re.compile(r"attn|attention|router|gate|moe|expert|output_router|logits_to_keep|return_|embed|mup_enabled")
"""The names of settings that concern something else."""


class NotModelled(ValueError):
    """The configuration has a setting about the logits that is not known here; the text names it."""


@dataclass(frozen=True, slots=True)
class FinalMap:
    """The map from W h to the logits. scale: factor of the logits, after the cap. soft_cap: nats, None without one.

    >>> FinalMap().is_linear, FinalMap(soft_cap=30.0).is_linear
    (True, False)
    """

    scale: float = 1.0
    soft_cap: float | None = None

    @property
    def is_linear(self) -> bool:
        return self.soft_cap is None

    def __str__(self) -> str:
        said = [] if self.scale == 1.0 else [f"logit scale {self.scale:g}"]
        said += [] if self.soft_cap is None else [f"soft cap {self.soft_cap:g}"]
        return ", ".join(said)


def read_final_map(config: Mapping[str, Any]) -> FinalMap:
    """Returns the map that a configuration describes. Raises NotModelled if it describes anything else.

    config: the model's config.json; for a model with several parts it is the one of the text model, on top.

    >>> read_final_map({"model_type": "granite", "logits_scaling": 8.0})
    FinalMap(scale=0.125, soft_cap=None)
    >>> read_final_map({"model_type": "gemma2", "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0})
    FinalMap(scale=1.0, soft_cap=30.0)
    >>> read_final_map({"model_type": "new", "logits_temper": 3.0})
    Traceback (most recent call last):
        ...
    hemostat.reference.hidden.head.NotModelled: logits_temper is 3.0: this is not modelled
    """
    kind = str(config.get("model_type", ""))
    scale, soft_cap = 1.0, None
    for name, value in sorted(config.items()):
        match name:
            case "logit_scale" | "lm_head_multiplier" if value is not None:
                scale *= _number(name, value)
            case "logits_scaling" if value is not None and kind.startswith("granite"):
                scale /= _number(name, value)
            case "logits_scaling" if value is not None and kind.startswith("hyperclovax"):
                scale *= _number(name, value)
            case "dim_model_base" if value is not None and kind.startswith("minicpm"):
                scale *= _number(name, value) / _number("hidden_size", config.get("hidden_size"))
            case "final_logit_softcapping" if value is not None:
                soft_cap = _number(name, value)
            case _ if _OF_LOGITS.search(name) and not _ELSEWHERE.search(name) and not _has_no_effect(value):
                raise NotModelled(f"{name} is {str(value)[:60]}: this is not modelled")
    return FinalMap(scale, soft_cap)


def _has_no_effect(value: object) -> bool:
    return value is None or value is False or (value is not True and value == 1)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise NotModelled(f"{name} is {str(value)[:60]}: a number above 0 is modelled")
    return float(value)


BLOCK_BYTES = 4 * 1024 * 1024
"""The size of one float32 block of the embedding, on a CPU: it stays in the cache between its conversion and its
product.
"""
GPU_BLOCK_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class OutputHead:
    """The output head of a checkpoint.

    weight: [V, d] as stored, see `StoredTensor.memory_map`. bias: float32 [V]; None without one.
    """

    weight: npt.NDArray[Any]
    bias: npt.NDArray[np.float32] | None
    final: FinalMap

    @property
    def vocab_size(self) -> int:
        return int(self.weight.shape[0])

    @property
    def width(self) -> int:
        """The size d of hidden states."""
        return int(self.weight.shape[1])

    @property
    def nonlinearity(self) -> str:
        """The reason why the logits are not linear in the hidden state; "" if they are."""
        if self.bias is not None:
            return "its output embedding has a bias"
        return "" if self.final.is_linear else f"its logits are capped (soft cap {self.final.soft_cap:g})"

    def __str__(self) -> str:
        parts = [f"{self.vocab_size} ids of {self.width}", *(["bias"] if self.bias is not None else [])]
        return ", ".join([*parts, *([str(self.final)] if str(self.final) else [])])

    def logits(self, states: Rows) -> Rows:
        """Returns the logits, float32 [n, V], of `states`, float32 [n, d]."""
        z = np.empty((len(states), self.vocab_size), np.float32)
        block = max(1, BLOCK_BYTES // (4 * self.width))
        for start in range(0, self.vocab_size, block):
            np.matmul(states, floats(self.weight[start : start + block]).T, out=z[:, start : start + block])
        if self.bias is not None:
            z += self.bias
        if self.final.soft_cap is not None:
            z = np.tanh(z / np.float32(self.final.soft_cap)) * np.float32(self.final.soft_cap)
        return z if self.final.scale == 1.0 else z * np.float32(self.final.scale)


class TorchHead:
    """The same on a torch device."""

    def __init__(self, head: OutputHead, device: str) -> None:
        import torch  # noqa: PLC0415  slow to import, and an extra

        self.head = head
        self.device = torch.device(device)
        weight = torch.from_numpy(head.weight)
        self.weight = (weight.view(torch.bfloat16) if weight.dtype == torch.uint16 else weight).to(self.device)
        self._bias = None if head.bias is None else torch.from_numpy(head.bias).to(self.device)
        block = BLOCK_BYTES if self.device.type == "cpu" else GPU_BLOCK_BYTES
        self._block = max(1, block // (4 * head.width))
        self._torch = torch

    def states(self, states: Rows) -> torch.Tensor:
        return self._torch.from_numpy(states).to(self.device)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Returns the logits, float32 [n, V], of `states`, float32 [n, d]."""
        z = self._torch.empty((len(states), self.head.vocab_size), dtype=self._torch.float32, device=self.device)
        for start in range(0, self.head.vocab_size, self._block):
            rows = slice(start, start + self._block)
            z[:, rows] = states @ self.weight[rows].float().T
        if self._bias is not None:
            z += self._bias
        final = self.head.final
        if final.soft_cap is not None:
            z.div_(final.soft_cap).tanh_().mul_(final.soft_cap)
        return z if final.scale == 1.0 else z.mul_(final.scale)


def open_head(folder: Path) -> OutputHead:
    """Returns the output head of the checkpoint in `folder`: only the bias is read. Raises EmbeddingError, whose text
    is one line."""
    try:
        config = read_config(folder)
    except (OSError, ValueError, TypeError) as error:
        raise EmbeddingError(f"{folder}/config.json: cannot be read ({in_words(error)})") from None
    size = vocabulary(config)
    if size is None:
        raise EmbeddingError(f"{folder}/config.json: does not say vocab_size; name the folder of the checkpoint")
    try:
        final = read_final_map(config)
    except NotModelled as error:
        raise EmbeddingError(f"{folder}/config.json: {error}, so the server's hidden states cannot be used") from None
    stored = find(folder, size)
    try:
        bias = None if stored.bias is None else floats(stored.bias.memory_map(size))
        return OutputHead(stored.weight.memory_map(size), bias, final)
    except OSError as error:
        raise EmbeddingError(f"{stored.weight.file}: cannot be read ({error.strerror})") from None
