"""What the monitor knows, without a server: one served model and its reference."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hemostat.reference.pair import ModelPair, ReferenceState, ServedModels
from hemostat.reference.protocol import ReferenceInfo


def pair(
    name: str,
    scorer: Any = None,
    info: ReferenceInfo | None = None,
    adapters: Iterable[str] = (),
    reference_adapters: Iterable[str] = (),
) -> ModelPair:
    """Matched where `info` is given."""
    return ModelPair(
        name,
        frozenset({name}),
        adapters=frozenset(adapters),
        scorer=scorer,
        reference=info,
        reference_adapters=frozenset(reference_adapters),
        state=ReferenceState.STARTING if info is None else ReferenceState.READY,
    )


def served_models(*pairs: ModelPair) -> ServedModels:
    """The first one is calibrated."""
    return ServedModels(pairs, pairs[0].name)
