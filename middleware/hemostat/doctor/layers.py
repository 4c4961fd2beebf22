"""The layer report: the error of each layer, and how much KL(r‖c) falls when it is restored. Torch.

Both models process the same tokens. `accumulated` compares the hidden states after the layer. `alone` compares the
outputs of both layers on the reference's input. Restoring replaces a module of the compressed model by the reference's,
with everything else compressed, and measures KL(r‖c) again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch

from hemostat.doctor.checkpoints import CheckpointPair, chunks, kl, pieces
from hemostat.doctor.pair import Ids, json_number
from hemostat.doctor.statistics import Estimate, Sample
from hemostat.models.work_folder import WorkFolder

MIN_PROMPTS = 16
"""The token budget is spread over at least this many prompts, or over all."""

Steps = Callable[[int, int], None]
"""Called with (finished steps, all steps)."""


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt and the first scored tokens after it."""

    prompt: Ids
    output: Ids

    def sequence(self, device: torch.device) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([self.prompt, self.output[:-1]]).astype(np.int64)).to(device)


class Incomparable(Exception):
    """The layers of the two models do not correspond; the text says why."""


@dataclass(frozen=True, slots=True)
class _Unit:
    """Modules that are restored together."""

    name: str
    kind: str
    """layer, kind (one kind of module in all layers) or ends (embeddings, final norm, head)."""
    modules: list[tuple[Any, str, Any]]
    """(parent in the compressed model, attribute, the reference's module)"""


class _Distances(msgspec.Struct):
    accumulated: list[float]
    cosine: list[float]
    alone: list[float]


def choose(texts: Sequence[Text], budget: int) -> list[Text]:
    """The first prompts, with `budget` tokens in total, spread over at least MIN_PROMPTS of them."""
    each = max(1, -(-budget // min(MIN_PROMPTS, len(texts))))
    chosen: list[Text] = []
    left = budget
    for text in texts:
        take = min(each, left, len(text.output))
        if take <= 0:
            break
        chosen.append(Text(text.prompt, text.output[:take]))
        left -= take
    return chosen


def layer_report(pair: CheckpointPair, texts: Sequence[Text], work: WorkFolder, steps: Steps) -> dict[str, Any]:
    """The report's `layers`. Finished steps are stored in `work`. Raises Incomparable."""
    with torch.inference_mode():
        return _report(pair, texts, work, steps)


def _report(pair: CheckpointPair, texts: Sequence[Text], work: WorkFolder, steps: Steps) -> dict[str, Any]:
    reference, compressed = pair.reference_model, pair.compressed_model
    r_layers, c_layers = decoder_layers(reference), decoder_layers(compressed)
    if len(r_layers) != len(c_layers):
        raise Incomparable(f"REFERENCE has {len(r_layers)} layers, COMPRESSED has {len(c_layers)}")
    units = _units(reference, compressed, r_layers, c_layers)
    total = len(units) + 2
    sample = Sample(np.repeat(np.arange(len(texts)), [len(text.output) for text in texts]), len(texts))
    reference_logits: list[torch.Tensor] = []

    def measure_kl() -> list[float]:
        if not reference_logits:
            # Kept on the CPU, in the model's dtype: the device already holds two models.
            reference_logits.extend(_logits(reference, text, pair.device).cpu() for text in texts)
        values: list[float] = []
        for text, r in zip(texts, reference_logits, strict=True):
            c = _logits(compressed, text, pair.device)
            for rows in chunks(len(c), pair.vocab_size):
                values += kl(r[rows].to(pair.device), c[rows]).tolist()
        return values

    steps(0, total)
    distances = _load_or_compute(
        work, "layer-distances", _Distances, lambda: _distances(pair, r_layers, c_layers, texts)
    )
    steps(1, total)
    base = np.array(_load_or_compute(work, "layer-base", list[float], measure_kl))
    steps(2, total)
    restored = []
    for done, unit in enumerate(units):

        def with_unit(unit: _Unit = unit) -> list[float]:
            with _restored(unit):
                return measure_kl()

        values = np.array(_load_or_compute(work, f"layer-{done:04d}", list[float], with_unit))
        won = sample.mean(base - values)
        restored.append(
            {
                "name": unit.name,
                "kind": unit.kind,
                "mean_kld": json_number(values.mean()),
                "won_nats": json_number(won.value),
                "won_se_by_request": json_number(won.by_request),
                "won_share": json_number(won.value / base.mean()) if base.mean() else None,
            }
        )
        steps(done + 3, total)
    mean: Estimate = sample.mean(base)
    return {
        "tokens": len(base),
        "requests": len(texts),
        "mean_kld": json_number(mean.value),
        "mean_kld_se_by_request": json_number(mean.by_request),
        "distances": [
            {"layer": n, "accumulated": a, "cosine": c, "alone": e}
            for n, (a, c, e) in enumerate(zip(distances.accumulated, distances.cosine, distances.alone, strict=True))
        ],
        "restored": restored,
    }


def decoder_layers(model: Any) -> Any:
    """The list of the model's layers. Raises Incomparable if it cannot be found."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    if not lists:
        raise Incomparable(f"{type(model).__name__} has no list of its {count} layers")
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()))


def _units(reference: Any, compressed: Any, r_layers: Any, c_layers: Any) -> list[_Unit]:
    """All modules that differ between the models."""
    units = [
        _Unit(f"layer {n}", "layer", [(c_layers, str(n), r)])
        for n, (r, c) in enumerate(zip(r_layers, c_layers, strict=True))
        if _differ(r, c)
    ]
    for name in dict(r_layers[0].named_children()):
        pairs = [(getattr(r, name, None), getattr(c, name, None), c) for r, c in zip(r_layers, c_layers, strict=True)]
        modules = [(parent, name, r) for r, c, parent in pairs if r is not None and c is not None and _differ(r, c)]
        if modules:
            units.append(_Unit(f"every {name}", "kind", modules))
    # Modules that neither are nor contain layers: embeddings, final norm, head.
    outside = [
        (parent, name, r) for parent, name, r, c in _outside_layers(reference, compressed, r_layers) if _differ(r, c)
    ]
    units += [_Unit(name, "ends", [(parent, name, module)]) for parent, name, module in outside]
    return units


def _outside_layers(reference: Any, compressed: Any, layers: Any) -> Iterator[tuple[Any, str, Any, Any]]:
    """(the compressed parent, attribute, reference's module, compressed module) outside of the layers."""
    for name, r in reference.named_children():
        c = getattr(compressed, name, None)
        if r is layers or c is None:
            continue
        if any(module is layers for module in r.modules()):
            yield from _outside_layers(r, c, layers)
        else:
            yield compressed, name, r, c


def _differ(r: Any, c: Any) -> bool:
    ours, theirs = r.state_dict(), c.state_dict()
    return ours.keys() != theirs.keys() or any(
        ours[name].shape != theirs[name].shape or not torch.equal(ours[name], theirs[name]) for name in ours
    )


@contextmanager
def _restored(unit: _Unit) -> Iterator[None]:
    with ExitStack() as stack:
        for parent, name, module in unit.modules:
            stack.callback(setattr, parent, name, getattr(parent, name))
            setattr(parent, name, module)
        yield


def _logits(model: Any, text: Text, device: torch.device) -> torch.Tensor:
    """[T, V] at the positions that predict the output."""
    return next(pieces(model, text.sequence(device), len(text.prompt) - 1, []))


def _distances(pair: CheckpointPair, r_layers: Any, c_layers: Any, texts: Sequence[Text]) -> _Distances:
    """Means over the scored positions, by layer."""
    sums = torch.zeros(3, len(r_layers), dtype=torch.float64)
    for text in texts:
        tokens = len(text.output)
        sequence = text.sequence(pair.device)
        after: list[torch.Tensor] = []

        def seen(
            n: int,
            arguments: tuple[Any, Any],
            output: torch.Tensor,
            after: list[torch.Tensor] = after,
            tokens: int = tokens,
        ) -> None:
            after.append(output[0, -tokens:])

        with _hooked(c_layers, seen):
            next(pieces(pair.compressed_model, sequence, len(sequence) - 1, []))

        def compared(
            n: int,
            arguments: tuple[Any, Any],
            output: torch.Tensor,
            after: list[torch.Tensor] = after,
            tokens: int = tokens,
        ) -> None:
            args, kwargs = arguments
            given = args[0] if args else kwargs["hidden_states"]
            r, c = output[0, -tokens:].float(), after[n].float()
            alone = _tensor(c_layers[n](*args, **kwargs))[0, -tokens:].float()
            added = r - given[0, -tokens:].float()
            sums[0, n] += _relative(c - r, r)
            sums[1, n] += float(torch.cosine_similarity(c, r, dim=-1).double().sum())
            sums[2, n] += _relative(alone - r, added)

        with _hooked(r_layers, compared):
            next(pieces(pair.reference_model, sequence, len(sequence) - 1, []))
    means = sums / sum(len(text.output) for text in texts)
    return _Distances(*means.tolist())


def _relative(error: torch.Tensor, of: torch.Tensor) -> float:
    """Sum over the rows of |error| / |of|."""
    norm = of.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return float((error.norm(dim=-1) / norm).double().sum())


@contextmanager
def _hooked(layers: Any, see: Callable[[int, tuple[Any, Any], torch.Tensor], None]) -> Iterator[None]:
    """Call `see(layer, (args, kwargs), output)` after each layer's forward pass."""
    with ExitStack() as stack:
        for n, layer in enumerate(layers):

            def hook(module: Any, args: Any, kwargs: Any, output: Any, n: int = n) -> None:
                see(n, (args, kwargs), _tensor(output))

            stack.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def _tensor(output: Any) -> torch.Tensor:
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def _load_or_compute(work: WorkFolder, name: str, kind: Any, compute: Callable[[], Any]) -> Any:
    """The stored value of the folder, or the result of `compute`, which is then stored."""
    if (data := work.get(name)) is not None:
        return msgspec.msgpack.decode(data, type=kind)
    value = compute()
    work.put(name, msgspec.msgpack.encode(value))
    return value
