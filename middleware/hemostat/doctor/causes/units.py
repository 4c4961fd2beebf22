"""Parts of two models that can be exchanged: layers, kinds of module, single linear layers, and what is outside of the
layers. Torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

Kind = Literal["layer", "kind", "ends", "module"]


class Incomparable(Exception):
    """The layers of the two models do not correspond; the text says why."""


@dataclass(frozen=True, slots=True)
class Place:
    """A module in both models: the parents, and the attribute under which each has it."""

    reference: Any
    compressed: Any
    attribute: str


@dataclass(frozen=True, slots=True)
class Unit:
    """Modules that are exchanged together.

    kind: layer, kind (one kind of module in all layers), ends (embeddings, final norm, head), or module (one linear
    layer of one layer). layer: its number, for layer and module. All layers and all ends together are the model.
    """

    name: str
    kind: Kind
    places: tuple[Place, ...]
    layer: int | None = None


def units_of(reference: Any, compressed: Any) -> list[Unit]:
    """All modules that differ between the models. Raises Incomparable."""
    r_layers, c_layers = layer_pairs(reference, compressed)
    units = [
        Unit(f"layer {n}", "layer", (Place(r_layers, c_layers, str(n)),), n)
        for n, (r, c) in enumerate(zip(r_layers, c_layers, strict=True))
        if _differ(r, c)
    ]
    for name in dict(r_layers[0].named_children()):
        pairs = [(r, c) for r, c in zip(r_layers, c_layers, strict=True) if hasattr(r, name) and hasattr(c, name)]
        places = tuple(Place(r, c, name) for r, c in pairs if _differ(getattr(r, name), getattr(c, name)))
        if places:
            units.append(Unit(f"every {name}", "kind", places))
    units += [Unit(place.attribute, "ends", (place,)) for place in _outside_layers(reference, compressed, r_layers)]
    for n, (r, c) in enumerate(zip(r_layers, c_layers, strict=True)):
        for name, module in r.named_modules():
            parent, _, attribute = name.rpartition(".")
            theirs = dict(c.named_modules()).get(name)
            if isinstance(module, torch.nn.Linear) and theirs is not None and _differ(module, theirs):
                place = Place(r.get_submodule(parent), c.get_submodule(parent), attribute)
                units.append(Unit(f"layer {n} {name}", "module", (place,), n))
    return units


def layer_pairs(reference: Any, compressed: Any) -> tuple[Any, Any]:
    """The lists of layers of both models, of equal length. Raises Incomparable."""
    r_layers, c_layers = decoder_layers(reference), decoder_layers(compressed)
    if len(r_layers) != len(c_layers):
        raise Incomparable(f"REFERENCE has {len(r_layers)} layers, COMPRESSED has {len(c_layers)}")
    return r_layers, c_layers


def decoder_layers(model: Any) -> Any:
    """The list of the model's layers. Raises Incomparable if it cannot be found."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    if not lists:
        raise Incomparable(f"{type(model).__name__} has no list of its {count} layers")
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()))


@contextmanager
def restored(unit: Unit) -> Iterator[None]:
    """Inside of the context the compressed model has the reference's modules."""
    with ExitStack() as stack:
        for place in unit.places:
            _exchange(stack, place.compressed, place.attribute, getattr(place.reference, place.attribute))
        yield


@contextmanager
def compressed_alone(unit: Unit) -> Iterator[None]:
    """Inside of the context the reference has the compressed model's modules: all others are restored."""
    with ExitStack() as stack:
        for place in unit.places:
            _exchange(stack, place.reference, place.attribute, getattr(place.compressed, place.attribute))
        yield


def _exchange(stack: ExitStack, parent: Any, attribute: str, module: Any) -> None:
    stack.callback(setattr, parent, attribute, getattr(parent, attribute))
    setattr(parent, attribute, module)


def _outside_layers(reference: Any, compressed: Any, layers: Any) -> Iterator[Place]:
    """Modules that differ, and neither are nor contain layers: embeddings, final norm, head."""
    for name, r in reference.named_children():
        c = getattr(compressed, name, None)
        if r is layers or c is None:
            continue
        if any(module is layers for module in r.modules()):
            yield from _outside_layers(r, c, layers)
        elif _differ(r, c):
            yield Place(reference, compressed, name)


def _differ(r: Any, c: Any) -> bool:
    ours, theirs = r.state_dict(), c.state_dict()
    return ours.keys() != theirs.keys() or any(
        ours[name].shape != theirs[name].shape or not torch.equal(ours[name], theirs[name]) for name in ours
    )
