"""What is known of the two models that are compared: the served one and the reference."""

from __future__ import annotations

from dataclasses import dataclass

from hemostat.reference.protocol import ReferenceInfo


@dataclass(frozen=True, slots=True)
class ModelPair:
    """The compressed model's server and the reference, as they were last seen.

    models: names under which the server serves the compressed model itself.
    adapters: names of the LoRA adapters that the server serves.
    reference_adapters: names of the LoRA adapters that the reference can score with.
    model: name of the compressed model that was compared with the reference; "" before the first comparison.
    reference: None until the two were compared and use the same token ids.
    """

    models: frozenset[str] = frozenset()
    adapters: frozenset[str] = frozenset()
    reference_adapters: frozenset[str] = frozenset()
    model: str = ""
    reference: ReferenceInfo | None = None

    @property
    def scorable_adapters(self) -> frozenset[str]:
        """Both servers have these, under the same names."""
        return self.adapters & self.reference_adapters

    @property
    def unscorable_adapters(self) -> frozenset[str]:
        return self.adapters - self.reference_adapters
