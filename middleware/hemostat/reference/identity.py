"""The marks that tell one served model from another behind the same address."""

from __future__ import annotations

from contextlib import suppress

import msgspec

from hemostat.reference.match import mean_difference, probed_scores
from hemostat.reference.protocol import ReferenceFailure
from hemostat.reference.server import ModelCard, VllmServer


class Identity(msgspec.Struct, frozen=True):
    """The marks that tell one candidate from another. probe: log-probabilities of the tokens of fixed texts, nats."""

    model: str
    root: str
    version: str
    max_model_len: int
    probe: tuple[float, ...]

    def differences(self, other: Identity, tolerance: float) -> list[str]:
        """Returns what differs, in words. tolerance: the largest mean difference of the probes that is noise, nats."""
        changed = [
            f"{name} is {now!r} in place of {before!r}"
            for name, before, now in (
                ("the model", self.model, other.model),
                ("its folder", self.root, other.root),
                ("vLLM", self.version, other.version),
                ("the longest context", self.max_model_len, other.max_model_len),
            )
            if before != now
        ]
        far = mean_difference(self.probe, other.probe)
        if far > tolerance:
            changed.append(f"the tokens of fixed texts have other log-probabilities, by {far:.3f} nats on average")
        return changed


async def identity_of(server: VllmServer, card: ModelCard) -> Identity:
    """Returns the identity of a served model. Raises ReferenceFailure."""
    version = ""
    with suppress(ReferenceFailure):  # a router in front of vLLM may not have the route
        version = await server.version()
    probe = await probed_scores(server, card)
    return Identity(card.id, card.root or "", version, card.max_model_len or 0, probe)
