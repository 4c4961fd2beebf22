"""Parts of two models that can be exchanged: layers, kinds of module, single linear layers, and what is outside of the
layers. Torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
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
    return layer_list(model)[2]


def layer_list(model: Any) -> tuple[Any, str, Any]:
    """(the module that has the list of the model's layers, its attribute, the list). Raises Incomparable."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    result = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, torch.nn.ModuleList) and len(child) == count
    ]
    if not result:
        raise Incomparable(f"{type(model).__name__} has no list of its {count} layers")
    return max(result, key=lambda entry: sum(p.numel() for p in entry[2].parameters()))


def restored(unit: Unit) -> AbstractContextManager[None]:
    """Inside of the context the compressed model has the reference's modules."""
    return _replaced([(place.compressed, place.reference, place.attribute) for place in unit.places])


def compressed_alone(unit: Unit) -> AbstractContextManager[None]:
    """Inside of the context the reference has the compressed model's modules: all others are restored."""
    return _replaced([(place.reference, place.compressed, place.attribute) for place in unit.places])


@contextmanager
def _replaced(places: Sequence[tuple[Any, Any, str]]) -> Iterator[None]:
    """places: (module, another one, the attribute whose value it gets from that one inside of the context)."""
    with ExitStack() as stack:
        for module, other, attribute in places:
            stack.callback(setattr, module, attribute, getattr(module, attribute))
            setattr(module, attribute, getattr(other, attribute))
        yield


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
