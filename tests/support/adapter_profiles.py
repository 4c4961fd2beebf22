"""Adapters for SmolLM2-135M: random ones, strong enough to change what it says."""

from __future__ import annotations

import numpy as np

from hemostat_calibration.adapters.factors import LowRank
from hemostat_calibration.profiles.adapter import adapter_profile
from hemostat_calibration.profiles.profile import CalibrationProfile

VOCAB_SIZE, LAYERS, WIDTH, HIDDEN, KEYS = 49_152, 30, 576, 1536, 192
SHAPES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH, KEYS),
    "self_attn.v_proj": (WIDTH, KEYS),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (WIDTH, HIDDEN),
    "mlp.up_proj": (WIDTH, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDTH),
}
"""(inputs, outputs) of a layer's modules."""


def smollm_adapter(rank: int, seed: int, strength: float = 0.05) -> CalibrationProfile:
    """Of all modules. strength: standard deviation of the weights' change."""
    rng = np.random.default_rng(seed)
    layers = {}
    for layer in range(LAYERS):
        for name, (inputs, outputs) in SHAPES.items():
            a = rng.normal(0.0, 1.0, (rank, inputs)).astype(np.float32)
            b = rng.normal(0.0, strength / np.sqrt(rank), (outputs, rank)).astype(np.float32)
            layers[f"model.layers.{layer}.{name}"] = LowRank(a, b)
    return adapter_profile(model="", vocab_size=VOCAB_SIZE, layers=layers)
