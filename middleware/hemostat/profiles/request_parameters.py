"""`calibration.apply: request`: a profile as sampling parameters, for a vLLM without the plugin."""

from __future__ import annotations

from typing import Any

import numpy as np

from hemostat.profiles.families import FAMILY_RULES
from hemostat_calibration.errors import InvalidProfileError
from hemostat_calibration.profiles.profile import CalibrationProfile, temperature_bias

MAX_LOGIT_BIAS_ENTRIES = 300
"""Entries of `logit_bias` that are sent with a request."""


class RequestParameters:
    """Decides which profiles a request can carry, and in which form.

    enabled: `calibration.apply` is `request`.
    default_temperature_is_one: the server is known to have no default temperature of its own, so that a profile's
        temperature may be sent where the client sent none. Otherwise it would replace the server's default.
    """

    def __init__(self, *, enabled: bool, default_temperature_is_one: bool) -> None:
        self.enabled = enabled
        self._default_temperature_is_one = default_temperature_is_one
        self._last: tuple[str, dict[str, Any]] = ("", {})
        """Version and its parameters: they are asked for at every policy."""

    def of(self, profile: CalibrationProfile | None) -> dict[str, Any]:
        """Returns the fields of the relays' policy; {} if nothing is to be sent."""
        if not self.enabled or profile is None or not FAMILY_RULES[profile.family].fits_request:
            return {}
        if self._last[0] != profile.version:
            self._last = (profile.version, as_request(profile))
        return self._last[1]

    def require_fit(self, profile: CalibrationProfile) -> None:
        """Raises InvalidProfileError if requests are what profiles are sent with, and cannot carry this one."""
        if not self.enabled:
            return
        if not FAMILY_RULES[profile.family].fits_request:
            raise InvalidProfileError(
                f"calibration.apply: request cannot carry a profile of the family {profile.family}"
            )
        beta = float(profile.parameters["inverse_temperature"])
        if beta != 1.0 and not self._default_temperature_is_one:
            raise InvalidProfileError(
                f"profile has the temperature {1.0 / beta:.3g}, which would replace the server's own default: "
                "import one with 1, or set upstream.openai_sampling_defaults where the server has none"
            )

    def variants(self, proposal: CalibrationProfile) -> list[CalibrationProfile]:
        """Returns the forms of a temperature-and-bias proposal that are tested, each for itself, in this order.

        They are the proposal without the temperature, and as learned: E_r[Δz] of a bias is known exactly, but of a
        temperature only as a bound (it takes the compressed model's logits at every id), so the bias alone can often
        prove what both cannot. It comes first, since an earlier test has more of alpha. Where requests carry the
        profile, only what a request can carry is tested.
        """
        bias = np.array(proposal.parameters["bias"])
        if self.enabled:
            kept = largest_entries(bias)
            sparse = np.zeros_like(bias)
            sparse[kept] = bias[kept]
            bias = sparse
        temperatures = [1.0]
        if self._default_temperature_is_one or not self.enabled:
            temperatures.append(1.0 / float(proposal.parameters["inverse_temperature"]))
        made = [
            temperature_bias(proposal.model, proposal.vocab_size, t, bias, proposal.clamp_nats, proposal.metadata)
            for t in temperatures
        ]
        return list({profile.version: profile for profile in made}.values())


def as_request(profile: CalibrationProfile) -> dict[str, Any]:
    """Returns the fields of the policy for a temperature-and-bias profile with Δz = (β − 1)z + b.

    vLLM adds `logit_bias` before it divides by the temperature: βz + b = (z + b/β)/(1/β). A temperature of 1 is not
    sent: it would replace the server's own default.
    """
    beta = float(profile.parameters["inverse_temperature"])
    bias = profile.parameters["bias"]
    return {
        "request_temperature": None if beta == 1.0 else 1.0 / beta,
        "request_logit_bias": {
            str(i): round(float(bias[i]) / beta, 4) for i in largest_entries(bias) if bias[i] != 0.0
        },
    }


def largest_entries(bias: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Ids of the `MAX_LOGIT_BIAS_ENTRIES` entries of `bias` [V] that are furthest from 0."""
    return np.argsort(-np.abs(bias), kind="stable")[:MAX_LOGIT_BIAS_ENTRIES]
