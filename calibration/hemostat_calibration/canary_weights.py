"""Compares checksums of an engine's weights, tensor by tensor.

Checksums are exact. They are comparable where the same model is served with equal parallelism, kernels and versions:
kernels store weights in layouts of their own, and each rank has a part. So checksums are compared within a *group*,
whose members have the same tensors and the same facts.

>>> then = WeightChecksums("m", {"layer 1": "a", "layer 2": "b"}, {"vLLM": "0.32.0"})
>>> now = WeightChecksums("m", {"layer 1": "a", "layer 2": "c"}, {"vLLM": "0.32.0"})
>>> then.group == now.group, now.differing(then)
(True, ['layer 2'])
>>> then.group == WeightChecksums("m", then.digests, {"vLLM": "0.33.0"}).group
False
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

BUSY = "requests are in progress"
"""The reason why an engine's plugin has computed no checksums, if it may compute them a little later."""


@dataclass(frozen=True, slots=True)
class WeightChecksums:
    """The checksums of one engine. model: the served name. digests: by tensor, in the order of the model. facts: what
    kernels and layouts depend on, such as the parallelism, by name."""

    model: str
    digests: Mapping[str, str]
    facts: Mapping[str, str]

    @property
    def group(self) -> str:
        """The digest of what has to be equal for a comparison."""
        text = json.dumps([self.model, sorted(self.facts.items()), sorted(self.digests)])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def differing(self, then: WeightChecksums) -> list[str]:
        """Returns the tensors with other checksums, in the order of the model."""
        return [name for name, digest in self.digests.items() if then.digests.get(name) != digest]
