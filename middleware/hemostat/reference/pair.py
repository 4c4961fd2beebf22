"""The models that are compared, as far as they are known: each served base model, and the reference that belongs to
it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from hemostat.reference.protocol import Reference, ReferenceInfo
from hemostat_calibration.reasoning import Markers


class ReferenceState(StrEnum):
    NONE = "none"
    """No reference is configured: nothing is scored."""
    STARTING = "starting"
    """One of the two models does not answer yet, or they are being compared again."""
    READY = "ready"
    """Both models use the same token ids; requests are scored."""
    MISMATCH = "mismatch"
    """The two differ, or the upstream does not support what scoring needs; `detail` names the fix."""
    DOWN = "down"
    """The reference does not start, or its last scores failed."""


@dataclass(frozen=True, slots=True)
class ModelPair:
    """A served base model and its reference, as they were last seen.

    name: its first served name. names: all of its names.
    root: the path that the server loaded it from, as the server says; "" if it does not.
    adapters: names of the LoRA adapters of this model that the server serves.
    scorer: its reference; None if none is configured.
    reference: None until the two were compared and use the same token ids, and again once they do not.
    reference_adapters: names of the LoRA adapters that the reference can score with.
    state, detail: whether its requests can be scored, and why not or with what.
    """

    name: str
    names: frozenset[str]
    root: str = ""
    adapters: frozenset[str] = frozenset()
    scorer: Reference | None = field(default=None, repr=False)
    reference: ReferenceInfo | None = None
    reference_adapters: frozenset[str] = frozenset()
    state: ReferenceState = ReferenceState.STARTING
    detail: str = ""
    markers: Markers | None = None
    """The markers of the model's thinking."""

    @property
    def scorable_adapters(self) -> frozenset[str]:
        """Both servers have these, under the same names."""
        return self.adapters & self.reference_adapters

    @property
    def scorable(self) -> frozenset[str]:
        """The model's names and the names of its adapters, as far as the reference can score them; empty without a
        match. A reference that is down for a while is still the model's match.
        """
        return self.names | self.scorable_adapters if self.reference is not None else frozenset()

    @property
    def compared(self) -> bool:
        """It is True if it is known whether the model has a matched reference."""
        return self.reference is not None or self.state in {ReferenceState.NONE, ReferenceState.MISMATCH}


@dataclass(frozen=True, slots=True)
class ServedModels:
    """Every base model of the server, in the server's order.

    calibrated_name: the first name of the one that profiles are learned and served for; "" while none is matched.
    """

    pairs: tuple[ModelPair, ...] = ()
    calibrated_name: str = ""

    def of(self, model: str) -> ModelPair | None:
        """Returns the pair of a served name, of a base model or an adapter; None if the server does not list it."""
        return next((pair for pair in self.pairs if model in pair.names or model in pair.adapters), None)

    @property
    def calibrated(self) -> ModelPair | None:
        """The matched model that profiles are learned and served for. Headline figures are of this one, too."""
        return next((pair for pair in self.pairs if pair.name == self.calibrated_name), None)

    @property
    def models(self) -> frozenset[str]:
        """The names of base models."""
        return frozenset[str]().union(*(pair.names for pair in self.pairs))

    @property
    def scorable_adapters(self) -> frozenset[str]:
        return frozenset[str]().union(*(pair.scorable & pair.adapters for pair in self.pairs))

    @property
    def unscorable_adapters(self) -> frozenset[str]:
        return frozenset[str]().union(*(pair.adapters - pair.scorable for pair in self.pairs))

    @property
    def scorable(self) -> frozenset[str] | None:
        """The served names that are compared with a matched reference; None before anything was compared."""
        if not any(pair.compared for pair in self.pairs):
            return None
        return frozenset[str]().union(*(pair.scorable for pair in self.pairs))


class ServedModelsSource(Protocol):
    """The part of `hemostat.reference.monitor.ReferenceMonitor` that scoring uses."""

    @property
    def served(self) -> ServedModels: ...
