"""A family that the product does not have: one number for each token, which is added to its logit.

It is registered where this module is imported, in the tables of numpy and of torch, and nowhere else.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from hemostat_calibration.arrays import Floats, Indices
from hemostat_calibration.profiles.families import VOCABULARY, FamilySpec, Parameter, Parameters, register
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_engine import transform

TOKEN_BIAS = "token_bias"


def token_bias(model: str, bias: npt.NDArray[np.floating], clamp_nats: float, tokens: int = 0) -> CalibrationProfile:
    """bias: [V], nats. tokens: the number that it says it was learned from."""
    return CalibrationProfile(
        family=TOKEN_BIAS,
        model=model,
        vocab_size=len(bias),
        parameters={"bias": np.asarray(bias, dtype=np.float32)},
        clamp_nats=clamp_nats,
        metadata={"tokens": str(tokens)},
    )


def _shift(parameters: Parameters, relative: Floats, ids: Indices | None, _: Floats | None) -> Floats:
    bias = parameters["bias"].astype(np.float64)
    return np.broadcast_to(bias, relative.shape) if ids is None else bias[ids]


def _range(parameters: Parameters, most: Floats) -> tuple[Floats, Floats]:
    bias = parameters["bias"].astype(np.float64)
    return np.full_like(most, bias.min()), np.full_like(most, bias.max())


register(
    TOKEN_BIAS,
    FamilySpec(
        parameters={"bias": Parameter((VOCABULARY,))},
        shift=_shift,
        range=_range,
        check=lambda parameters: "",
        token_shift=lambda parameters: parameters["bias"],
        queue_priority=2,
    ),
)


def _torch_shift(parameters: transform.Parameters, logits: torch.Tensor, rows: torch.Tensor | None) -> transform.Shift:
    return transform.Shift(parameters["bias"].expand(len(logits) if rows is None else len(rows), -1).clone())


transform.FAMILIES[TOKEN_BIAS] = transform.Family(_torch_shift)
