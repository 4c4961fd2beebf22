"""Texts through a model, layer by layer: one layer's weights in memory at a time.

Texts of different length are padded at the end, where no position of a causal model sees the padding; what is measured
leaves it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hemostat.checkpoints.errors import AdaptError
from hemostat_calibration.adapters.gram import DiagonalGram, FullGram, Gram, Metric
from hemostat_lab.models.skeleton import Skeleton, WeightSource

Ids = npt.NDArray[np.int32]
Hook = Callable[[Any, tuple[Any, ...], torch.Tensor], None]
"""Called after a module's forward pass with the module, its arguments and its output."""

MAX_BATCH_POSITIONS = 1024
"""Positions of one batch, padding included; a longer text is a batch of its own."""
MAX_LOGITS = 1 << 24
"""Elements of the logits that are computed at once (64 MiB in float32)."""
GRAM_ROWS = 1024
"""Rows in one float32 product of second moments; such products are added up in float64."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts that are processed together.

    texts: their positions in the list of texts. ids: int64 [texts, positions]. valid: bool of the same shape, False for
    padding.
    """

    texts: tuple[int, ...]
    ids: torch.Tensor
    valid: torch.Tensor


@dataclass(frozen=True, slots=True)
class Calls:
    """The arguments beside the hidden states with which the model calls each decoder layer: positions, masks."""

    positional: tuple[tuple[Any, ...], ...]
    named: tuple[Mapping[str, Any], ...]


def make_batches(texts: Sequence[Ids], device: torch.device, max_positions: int = MAX_BATCH_POSITIONS) -> list[Batch]:
    """Texts of similar length together; every text once. Deterministic."""
    order = sorted(range(len(texts)), key=lambda n: (len(texts[n]), n))
    groups: list[list[int]] = []
    for n in order:
        # Sorted by length: the newest text is the longest of its batch.
        if groups and (len(groups[-1]) + 1) * len(texts[n]) <= max_positions:
            groups[-1].append(n)
        else:
            groups.append([n])
    batches = []
    for group in groups:
        length = len(texts[group[-1]])
        # Padded with the text's last token: also layers that mix positions in no order, such as experts, see real text.
        rows = [np.pad(texts[n].astype(np.int64), (0, length - len(texts[n])), mode="edge") for n in group]
        lengths = torch.tensor([len(texts[n]) for n in group])
        batches.append(
            Batch(
                tuple(group),
                torch.from_numpy(np.stack(rows)).to(device),
                (torch.arange(length)[None] < lengths[:, None]).to(device),
            )
        )
    return batches


def embed(skeleton: Skeleton, source: WeightSource, batches: Sequence[Batch]) -> tuple[list[torch.Tensor], list[Calls]]:
    """The hidden states [texts, positions, d] before the first layer, and the arguments of all layers, by batch."""
    hidden: list[torch.Tensor] = []
    calls: list[Calls] = []
    with torch.no_grad(), skeleton.loaded(skeleton.ends(), source):
        for batch in batches:
            first, made = _record(skeleton, batch)
            hidden.append(first)
            calls.append(made)
    return hidden, calls


def run_layer(skeleton: Skeleton, index: int, hidden: torch.Tensor, calls: Calls) -> torch.Tensor:
    """The hidden states after decoder layer `index`, which is loaded."""
    layer = list(skeleton.layers.values())[index]
    output = layer(hidden, *calls.positional[index], **calls.named[index])
    result: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return result


def logits(
    skeleton: Skeleton, batch: Batch, hidden: torch.Tensor, wanted: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits [n, V] after the last decoder layer, whose outputs are `hidden`, and where they belong: the indices [n]
    into the flattened batch. Only where `wanted`, bool [texts, positions], is true; a part at a time.

    The model's parameters outside of the layers must be loaded. Its own code computes the final norm, the head, and
    what it does with the logits.
    """
    width = int(skeleton.model.get_output_embeddings().weight.shape[0])
    rows = max(1, MAX_LOGITS // width)
    for text in range(len(batch.texts)):
        positions = wanted[text].nonzero()[:, 0]
        for part in positions.split(rows):
            keep = {"logits_to_keep": part} if skeleton.can_select_logits else {}
            with _layers_return(skeleton, hidden[text : text + 1]):
                answer = skeleton.model(input_ids=batch.ids[text : text + 1], use_cache=False, **keep).logits[0]
            yield (answer if keep else answer[part]), text * batch.ids.shape[1] + part


def output_gradients(
    skeleton: Skeleton, source: WeightSource, batches: Sequence[Batch], hidden: Sequence[torch.Tensor], seed: int
) -> list[torch.Tensor]:
    """The gradient of the loss at the last layer's outputs, by batch, zero at padding.

    The loss is −Σ log p(y) with each token y drawn from the model's own prediction: so that the second moments of the
    gradients are the Fisher information (Martens 2020, arXiv 1412.1193, section 9.2: not the empirical one).
    """
    gradients = []
    with skeleton.loaded(skeleton.ends(), source):
        for number, (batch, states) in enumerate(zip(batches, hidden, strict=True)):
            leaf = states.detach().clone().requires_grad_(True)
            uniforms = np.random.default_rng([seed, number]).random(batch.valid.numel())
            for part, where in logits(skeleton, batch, leaf, batch.valid):
                exact = part.float()
                with torch.no_grad():
                    total = torch.softmax(exact, dim=-1).cumsum(-1, dtype=torch.float64)
                    at = torch.from_numpy(uniforms).to(total.device)[where][:, None] * total[:, -1:]
                    drawn = torch.searchsorted(total, at, right=True).clamp_max(exact.shape[-1] - 1)
                loss = torch.logsumexp(exact, dim=-1).sum() - exact.gather(1, drawn).sum()
                loss.backward()
            assert leaf.grad is not None
            gradients.append(leaf.grad)
    return gradients


class Moments:
    """Second moments of what the linear layers of one decoder layer read, and of the gradients at their outputs.

    groups: layer -> the name under which its inputs are measured: layers that read the same tensor share it.
    """

    def __init__(self) -> None:
        self.groups: dict[str, str] = {}
        self._count: dict[str, int] = {}
        self._totals: dict[str, torch.Tensor] = {}

    def gram(self, key: str) -> Gram:
        """Of the inputs of a group, or of the outputs of a layer (`output_key`)."""
        total = self._totals[key].cpu().numpy()
        total.flags.writeable = False
        kind = FullGram if total.ndim == 2 else DiagonalGram
        result: Gram = kind(self._count[key], total)
        return result

    def inputs(self, name: str) -> Gram:
        return self.gram(self.groups[name])

    def outputs(self, name: str) -> Gram | None:
        return self.gram(output_key(name)) if output_key(name) in self._totals else None

    def update(self, key: str, rows: torch.Tensor, metric: Metric) -> None:
        """Rows [n, d] of any dtype."""
        width = rows.shape[1]
        if key not in self._totals:
            shape = (width, width) if metric is Metric.FULL else (width,)
            self._totals[key] = torch.zeros(shape, dtype=torch.float64)
            self._count[key] = 0
        total = self._totals[key]
        with exact_products(rows.dtype):
            for part in rows.split(GRAM_ROWS):
                exact = part.float()
                product = exact.T @ exact if metric is Metric.FULL else exact.square().sum(0, dtype=torch.float64)
                total += product.to(total.device, torch.float64)
        self._count[key] += len(rows)


@contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Inside of the context, products of float32 matrices are computed as fast as the processor allows it without
    rounding entries that came from `dtype`.

    Entries that were bfloat16 stay exact if a processor multiplies in bfloat16 and adds in float32. With AMX a product
    of 1,024 by 1,536 entries takes a third of the time then.
    """
    before = torch.get_float32_matmul_precision()
    if dtype is torch.bfloat16:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def output_key(name: str) -> str:
    return f"{name}|outputs"


def valid_rows(tensor: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """[n, d] of a tensor [texts, positions, d], without those of padding; all rows of one of another shape. Without
    gradient. valid: bool [texts, positions]."""
    flat = tensor.detach()
    return flat[valid] if flat.shape[:2] == valid.shape and flat.ndim == 3 else flat.reshape(-1, flat.shape[-1])


@contextmanager
def forward_hooks(hooks: Iterable[tuple[Any, Hook]]) -> Iterator[None]:
    """Inside of the context, each of the modules calls its hook."""
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


@contextmanager
def measured(
    skeleton: Skeleton,
    layer: str,
    valid: torch.Tensor,
    moments: Moments,
    metrics: Mapping[str, Metric],
    gradients: bool,
) -> Iterator[None]:
    """Inside of the context, forward passes through the decoder layer `layer` add to `moments`, and, with `gradients`,
    backward passes too. valid: bool [texts, positions]. metrics: by key; for a key without one nothing is kept."""
    # Tensors that were read meanwhile: kept, so that another one does not get the same identity.
    read: dict[int, tuple[str, torch.Tensor]] = {}

    def hook(name: str) -> Hook:
        def see(module: Any, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
            given = arguments[0]
            group, _ = read.setdefault(id(given), (name, given))
            moments.groups[name] = group
            if group == name and name in metrics:
                moments.update(name, valid_rows(given, valid), metrics[name])
            if gradients and output_key(name) in metrics and output.requires_grad:
                key = output_key(name)
                output.register_hook(lambda gradient: moments.update(key, valid_rows(gradient, valid), metrics[key]))

        return see

    try:
        with forward_hooks((module, hook(name)) for name, module in skeleton.linears_of(layer).items()):
            yield
    finally:
        read.clear()


def _record(skeleton: Skeleton, batch: Batch) -> tuple[torch.Tensor, Calls]:
    first: list[torch.Tensor] = []
    positional: list[tuple[Any, ...]] = []
    named: list[Mapping[str, Any]] = []

    def see(hidden: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        if not first:
            first.append(hidden)
        positional.append(arguments)
        named.append(keywords)
        return hidden

    with _replaced(skeleton, see):
        skeleton.base(input_ids=batch.ids, use_cache=False)
    if len(named) != len(skeleton.layers):
        raise AdaptError(
            f"{type(skeleton.model).__name__} does not call each of its {len(skeleton.layers)} layers once: it is not "
            "supported"
        )
    return first[0], Calls(tuple(positional), tuple(named))


@contextmanager
def _layers_return(skeleton: Skeleton, hidden: torch.Tensor) -> Iterator[None]:
    """All decoder layers return `hidden`, whatever they are given."""
    with _replaced(skeleton, lambda *arguments, **keywords: hidden):
        yield


@contextmanager
def _replaced(skeleton: Skeleton, forward: Callable[..., torch.Tensor]) -> Iterator[None]:
    """The decoder layers compute `forward` in place of their own."""
    for layer in skeleton.layers.values():
        layer.forward = forward
    try:
        yield
    finally:
        for layer in skeleton.layers.values():
            del layer.forward
