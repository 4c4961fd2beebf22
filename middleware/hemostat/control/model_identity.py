"""The identity of the models that stored evidence is about."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

from hemostat.reference.match import same_weights
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
    """The digest of the reference."""
    weights: str = ""
    """The fingerprint of the compressed weights: `engines.reports.ServedWeights`."""
    probe: tuple[float, ...] = ()
    """The scores of fixed texts on the reference, if its digest does not say what its weights are
    (`reference.match.probed_scores`). It is compared within the noise of a server."""

    def agrees_with(self, other: ModelIdentity) -> bool:
        """Returns True if whatever both know is equal, and both probes are of the same weights.

        >>> ModelIdentity("m").agrees_with(ModelIdentity("m", compressed="/models/w4a16"))
        True
        """
        if self.probe and other.probe and not same_weights(self.probe, other.probe):
            return False
        theirs = asdict(other)
        known = ((name, value) for name, value in asdict(self).items() if value and name != "probe")
        return all(theirs[name] in (value, "", 0) for name, value in known)

    def completed_by(self, other: ModelIdentity | None) -> ModelIdentity:
        """Returns this identity with what only the other one knows.

        >>> ModelIdentity("m").completed_by(ModelIdentity("m", weights="1")).weights
        '1'
        """
        if other is None:
            return self
        known = replace(self, **{name: value for name, value in asdict(other).items() if not getattr(self, name)})
        # The first probe of the same weights stays, as in `VllmReference.start`.
        return replace(known, probe=other.probe) if other.probe and same_weights(other.probe, known.probe) else known

    def to_json(self) -> str:
        fields = asdict(self)
        if not self.probe:
            del fields["probe"]  # as versions without it have stored it
        return json.dumps(fields, sort_keys=True)


DAMAGED = ModelIdentity(vocab_size=-1)
"""An identity that agrees with no models."""


def model_identity(pair: ModelPair, weights: str = "") -> ModelIdentity:
    """Returns the identity of a pair that has a reference."""
    assert pair.reference is not None
    known = pair.reference
    return ModelIdentity(pair.name, known.vocab_size, pair.root, known.digest, weights, known.probe)
