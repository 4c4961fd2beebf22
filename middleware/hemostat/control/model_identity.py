"""Which models stored evidence is about."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

import msgspec

from hemostat.reference.pair import ModelPair


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """A compressed model and its reference; "" or 0 stands for what is not known (yet)."""

    model: str = ""
    """The compressed model's served name."""
    vocab_size: int = 0
    compressed: str = ""
    """The path that its server loaded it from."""
    reference: str = ""
    """The reference's digest."""
    weights: str = ""
    """Fingerprint of the compressed weights: `engines.served_weights.ServedWeights`."""

    def agrees_with(self, other: ModelIdentity) -> bool:
        """Whatever both know is equal.

        >>> ModelIdentity("m").agrees_with(ModelIdentity("m", compressed="/models/w4a16"))
        True
        """
        theirs = asdict(other)
        return all(theirs[name] in (value, "", 0) for name, value in asdict(self).items() if value)

    def completed_by(self, other: ModelIdentity | None) -> ModelIdentity:
        """With what only the other one knows.

        >>> ModelIdentity("m").completed_by(ModelIdentity("m", weights="1")).weights
        '1'
        """
        if other is None:
            return self
        return replace(self, **{name: value for name, value in asdict(other).items() if not getattr(self, name)})

    @property
    def without_weights(self) -> ModelIdentity:
        return replace(self, weights="")

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


DAMAGED = ModelIdentity(vocab_size=-1)
"""Agrees with no models."""


def from_json(stored: str) -> ModelIdentity:
    """`to_json` undone; DAMAGED of what is not from there."""
    try:
        return msgspec.json.decode(stored, type=ModelIdentity)
    except msgspec.MsgspecError:
        return DAMAGED


def model_identity(pair: ModelPair, weights: str = "") -> ModelIdentity:
    """Of a pair that has a reference."""
    assert pair.reference is not None
    return ModelIdentity(pair.name, pair.reference.vocab_size, pair.root, pair.reference.digest, weights)
