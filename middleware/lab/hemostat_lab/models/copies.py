"""A whole model with dense weights, in this process, and adapters on top of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hemostat.checkpoints.errors import AdaptError
from hemostat_calibration.adapters.factors import LowRank
from hemostat_calibration.messages import one_line
from hemostat_lab.models.checkpoint import Checkpoint
from hemostat_lab.models.processor import lacks_avx512
from hemostat_lab.models.skeleton import CopyLinear, Skeleton, WeightSource, set_factors

Adapter = Mapping[str, LowRank]
"""Name of a linear layer in the checkpoint -> its correction."""
Ids = Sequence[int] | npt.NDArray[np.integer[Any]]
Floats = npt.NDArray[np.float32]

MAX_PREPARED = 4
"""Adapters whose factors are kept as tensors."""


class Copy:
    """A checkpoint's model, computed as an engine with its weights computes it: dense, in `dtype`.

    Not thread-safe. linears: the layers that an adapter can change, by name.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self.model: Any = skeleton.model
        self.device = skeleton.device
        self.linears: Mapping[str, CopyLinear] = skeleton.linears
        self.vocab_size = int(self.model.get_output_embeddings().weight.shape[0])
        self._prepared: OrderedDict[int, tuple[Adapter, dict[str, tuple[torch.Tensor, torch.Tensor]]]] = OrderedDict()

    @classmethod
    def load(cls, folder: Path, device: str = "cpu", dtype: str = "auto", label: str = "checkpoint") -> Copy:
        """dtype: of torch; `auto` is the checkpoint's own. Raises AdaptError."""
        checkpoint = Checkpoint(folder, label)
        on = device_of(device)
        skeleton = Skeleton(checkpoint.config, dtype_of(checkpoint, dtype, on), on, label)
        skeleton.load(list(skeleton.places), weights_of(checkpoint))
        for name, module in skeleton.linears.items():
            module.inputs = checkpoint.inputs(name)
        return cls(skeleton)

    def logits(self, ids: Ids, adapter: Adapter | None = None) -> Floats:
        """Float32 [n, V] for `ids` [n]: row t is about the token after ids[t]."""
        with torch.inference_mode(), self.adapted(adapter):
            return _numpy(self.model(input_ids=self._tensor(ids), use_cache=False).logits[0])

    def hidden(self, ids: Ids, adapter: Adapter | None = None) -> Floats:
        """Float32 [n, d] for `ids` [n]: hidden states after the final norm."""
        with torch.inference_mode(), self.adapted(adapter):
            return _numpy(self.skeleton.base(input_ids=self._tensor(ids), use_cache=False).last_hidden_state[0])

    def head_logits(self, hidden: npt.NDArray[np.floating[Any]]) -> Floats:
        """Float32 [n, V] for hidden states [n, d] after the final norm, of this model or of one with the same head.

        The model's own code computes what it does with the logits, such as a soft cap.
        """
        from transformers.modeling_outputs import BaseModelOutputWithPast  # noqa: PLC0415  slow to import

        states = torch.from_numpy(np.ascontiguousarray(hidden, np.float32)).to(self.device, self.skeleton.dtype)
        base = self.skeleton.base
        base.forward = lambda *_, **__: BaseModelOutputWithPast(last_hidden_state=states[None])
        try:
            with torch.inference_mode():
                ids = torch.zeros(1, len(states), dtype=torch.long, device=self.device)
                return _numpy(self.model(input_ids=ids, use_cache=False).logits[0])
        finally:
            del base.forward

    def logprobs(self, ids: Ids, adapter: Adapter | None = None) -> Floats:
        """Float32 [n - 1] for `ids` [n]: log-probability of each token after the first one, in nats."""
        with torch.inference_mode(), self.adapted(adapter):
            tensor = self._tensor(ids)
            logits = self.model(input_ids=tensor, use_cache=False).logits[0, :-1].float()
            chosen = logits.gather(1, tensor[0, 1:, None])[:, 0] - torch.logsumexp(logits, dim=-1)
            return _numpy(chosen)

    @contextmanager
    def adapted(self, adapter: Adapter | None) -> Iterator[None]:
        """The model has the adapter's corrections inside of the context, in the model's dtype as at an engine.

        Raises AdaptError for a layer that the model does not have, or of another shape.
        """
        set_factors(self.linears, {} if adapter is None else self._factors(adapter))
        try:
            yield
        finally:
            set_factors(self.linears, {})

    def _factors(self, adapter: Adapter) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        # By identity: the mapping is kept with its tensors, so its id is not used again meanwhile.
        prepared = self._prepared.get(id(adapter))
        if prepared is None:
            prepared = (adapter, factor_tensors(adapter, self.linears, self.device, self.skeleton.dtype))
            self._prepared[id(adapter)] = prepared
            if len(self._prepared) > MAX_PREPARED:
                self._prepared.popitem(last=False)
        self._prepared.move_to_end(id(adapter))
        return prepared[1]

    def _tensor(self, ids: Ids) -> torch.Tensor:
        return torch.from_numpy(np.asarray(ids, np.int64))[None].to(self.device)


def factor_tensors(
    adapter: Adapter, linears: Mapping[str, CopyLinear], device: torch.device, dtype: torch.dtype
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The factors of `CopyLinear`. Raises AdaptError where they do not fit `linears`."""
    tensors = {}
    for name, factors in adapter.items():
        module = linears.get(name)
        if module is None:
            raise AdaptError(f"the adapter has a layer {name}, which the model does not have: it is for another model")
        wanted = (module.in_features, module.out_features)
        actual = (factors.a.shape[1], factors.b.shape[0])
        if wanted != actual:
            raise AdaptError(f"the adapter's layer {name} has {actual} inputs and outputs, the model's has {wanted}")
        tensors[name] = (
            torch.from_numpy(np.ascontiguousarray(factors.a)).to(device, dtype),
            torch.from_numpy(np.ascontiguousarray(factors.b)).to(device, dtype),
        )
    return tensors


def weights_of(checkpoint: Checkpoint) -> WeightSource:
    """The dequantized parameters of a checkpoint, by name."""

    def source(name: str) -> torch.Tensor:
        module, _, part = name.rpartition(".")
        return checkpoint.weight(module) if part == "weight" else checkpoint.tensor(name)

    return source


def dtype_of(checkpoint: Checkpoint, dtype: str, device: torch.device) -> torch.dtype:
    """The torch dtype of this name; for `auto` that of the checkpoint, bfloat16 if it names none. In place of it, a
    processor that computes numbers of 16 bits slowly gets float32."""
    if dtype == "auto" and device.type == "cpu" and lacks_avx512():
        return torch.float32
    named = getattr(checkpoint.config.get_text_config(), "dtype", None) if dtype == "auto" else dtype
    result = getattr(torch, named, None) if isinstance(named, str) else named
    if result is None:
        result = torch.bfloat16
    if not isinstance(result, torch.dtype) or not result.is_floating_point:
        raise AdaptError(f"{named!r} is not a dtype of weights: use bfloat16, float16 or float32")
    return result


def device_of(name: str) -> torch.device:
    """AdaptError unless torch can use it here."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise AdaptError(
            f"device {name} cannot be used ({one_line(error)}); use cpu, or cuda where torch has it"
        ) from None
    return device


def _numpy(tensor: torch.Tensor) -> Floats:
    values: Floats = tensor.float().cpu().numpy()
    return values
