"""Profile × logits in torch, inside the engine. The oracle is `hemostat_calibration.transform`; a family that is added
there is added here, and `FAMILIES` names what this engine can apply.

Logits z are float32 [R, V]. As in the oracle, entries that are not finite (-inf is a mask) stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from hemostat_calibration.errors import InvalidProfileError
from hemostat_calibration.families import TEMPERATURE_BIAS
from hemostat_calibration.profile import CalibrationProfile

CHUNK_ELEMENTS = 1 << 24
"""Logits that are worked on at a time: temporaries stay below 64 MiB each, whatever the batch."""

Parameters = dict[str, torch.Tensor]


def _temperature_bias(parameters: Parameters, relative: torch.Tensor) -> torch.Tensor:
    return relative.mul_(parameters["inverse_temperature"] - 1.0).add_(parameters["bias"])


FAMILIES: dict[str, Callable[[Parameters, torch.Tensor], torch.Tensor]] = {TEMPERATURE_BIAS: _temperature_bias}
"""(parameters, z - max z, which may be overwritten) -> Δz before the clamp, float32 [R, V] in nats."""


class HeldProfile:
    """A profile's parameters as float32 tensors: on the host, and on the device from its first binding on."""

    def __init__(self, profile: CalibrationProfile) -> None:
        if profile.family not in FAMILIES:
            raise InvalidProfileError(
                f"profile {profile.version} is of the family {profile.family!r}, which this engine plugin "
                "cannot apply: upgrade hemostat in vLLM's environment"
            )
        self.version = profile.version
        self.family = profile.family
        self.clamp_nats = profile.clamp_nats
        self._host = {
            name: torch.from_numpy(np.array(value, dtype=np.float32)) for name, value in profile.parameters.items()
        }
        self._on: dict[torch.device, Parameters] = {}

    def on(self, device: torch.device) -> Parameters:
        """The parameters on `device`. Called by the engine's thread only: copies stay on its stream."""
        if device not in self._on:
            self._on[device] = {name: value.to(device) for name, value in self._host.items()}
        return self._on[device]


def shift(profile: HeldProfile, z: torch.Tensor) -> torch.Tensor:
    """Δz, float32 [R, V] in nats, |Δz| ≤ the profile's clamp; 0 where z is not finite."""
    masked = ~torch.isfinite(z)
    top = z.masked_fill(masked, -torch.inf).amax(dim=-1, keepdim=True)
    delta = FAMILIES[profile.family](profile.on(z.device), z - top)
    return delta.clamp_(-profile.clamp_nats, profile.clamp_nats).masked_fill_(masked, 0.0)


def apply_to_rows(profile: HeldProfile, logits: torch.Tensor, rows: torch.Tensor) -> None:
    """Add Δz in place to `logits` [N, V] (float32, float16 or bfloat16) at `rows` (int64 [R], on the same device)."""
    for part in _parts(rows, logits.shape[1]):
        z = logits.index_select(0, part).float()
        logits.index_copy_(0, part, (z + shift(profile, z)).to(logits.dtype))


def apply_where(profile: HeldProfile, logits: torch.Tensor, chosen: torch.Tensor) -> None:
    """The same where `chosen` (bool [N], on the device) says so, without asking the device which rows those are."""
    step = max(1, CHUNK_ELEMENTS // logits.shape[1])
    for start in range(0, logits.shape[0], step):
        part = logits[start : start + step]
        z = part.float()
        mask = chosen[start : start + step, None]
        part.copy_(torch.where(mask, (z + shift(profile, z)).to(part.dtype), part))


def log_normalizers(profiles: tuple[HeldProfile, ...], logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """log E_c[e^Δz] with c = softmax(z), float32 [len(profiles), R] in nats, by profile, for the unmodified `rows`."""
    pieces = [
        _log_normalizers(profiles, logits.index_select(0, part).float()) for part in _parts(rows, logits.shape[1])
    ]
    return torch.cat(pieces, dim=1)


def _log_normalizers(profiles: tuple[HeldProfile, ...], z: torch.Tensor) -> torch.Tensor:
    before = torch.logsumexp(z, dim=-1)
    return torch.stack([torch.logsumexp(z + shift(profile, z), dim=-1) - before for profile in profiles])


def _parts(rows: torch.Tensor, vocab_size: int) -> Iterator[torch.Tensor]:
    yield from rows.split(max(1, CHUNK_ELEMENTS // vocab_size))
