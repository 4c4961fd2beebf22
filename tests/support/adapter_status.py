"""What the live parts of adapters report after a build, with figures like those of a real one (SmolLM2-135M, W4A16)."""

from __future__ import annotations

from typing import Any

from hemostat.control.composition import Control

VERSION, OLDER = "943966cbc77984eaaedbaa503a7051f1", "0f" * 16
TYPES = {
    "self_attn.q_proj": 0.83,
    "self_attn.k_proj": 0.88,
    "self_attn.v_proj": 0.78,
    "self_attn.o_proj": 0.7,
    "mlp.gate_proj": 0.67,
    "mlp.up_proj": 0.63,
    "mlp.down_proj": 0.98,
}
"""What is won, by type of layer."""
DEPTH = 30
PROBE = {"passed": 0, "failed": 0, "error": 0, "waiting": 0}


def last_build() -> dict[str, Any]:
    layers = {
        f"model.layers.{depth}.{name}": {"rank": 16, "won": won - 0.005 * depth}
        for depth in range(DEPTH)
        for name, won in TYPES.items()
    }
    return {
        "outcome": "proposed",
        "detail": "",
        "version": VERSION,
        "rank": 16,
        "max_rank": 64,
        "shared_out": True,
        "metric": "auto",
        "method": "training-free; full inputs and gradients",
        "tokens": 2000,
        "wall_seconds": 48.7,
        "seconds": 46.2,
        "cpu_seconds": 31.4,
        "peak_mib": 1842.2,
        "notes": [],
        "bytes": 5_520_000,
        "bytes_share": 0.0979,
        "engine_bytes": 39_075_840,
        "engine_bytes_share": 0.6928,
        "quantized_bytes": 56_405_280,
        "kinds": {name.split(".")[1]: {"layers": DEPTH, "rank": 16.0, "won": won} for name, won in TYPES.items()},
        "layers": layers,
        "held_out": {
            "tokens": 2032,
            "prompts": 45,
            "kl_before": 0.605,
            "kl_after": 0.2,
            "share": 0.67,
            "share_low": 0.65,
            "share_high": 0.69,
        },
    }


def learner(**changes: Any) -> dict[str, Any]:
    result = {
        "state": "collecting",
        "detail": "",
        "tokens": 3100,
        "known_tokens": 3100,
        "texts": 41,
        "next_tokens": 4000,
        "builds": {"proposed": 1, "ended": 1},
        "restarts": 2,
        "last_build": last_build(),
    }
    return result | changes


def judge(**changes: Any) -> dict[str, Any]:
    counts = {"judged": 57, "dropped": {"busy": 2}, "waiting": 1}
    result = {"state": "ready", "detail": "", **counts, "max_tokens": 4096, "bytes": 325_000_000}
    return result | changes


def engine(**changes: Any) -> dict[str, Any]:
    isolation = (
        "0 of 8 texts without an adapter differ beside adapters, mean |Δ| 0.0000 nats (beside rows without one: 0 of "
        "8, 0.0000)"
    )
    agreement = (
        "mean |Δ| to our copy 0.057 nats without it, 0.057 with it, 248 tokens; effect 0.310, correlation 0.996, "
        "factor 1.00"
    )
    result = {
        "state": "ready",
        "detail": "",
        "way": "resolver",
        "capacity": 1,
        "wanted": [VERSION],
        "loaded": [VERSION],
        "ready": [VERSION],
        "failures": {OLDER: "the engine does not apply it as our copy does"},
        "probes": {
            "isolation": {"detail": isolation, **PROBE, "passed": 1},
            "agreement": {"detail": f"{VERSION}: {agreement}", **PROBE, "passed": 1, "failed": 1, "waiting": 3},
        },
        "probe_tokens": 2520,
    }
    return result | changes


def parts(control: Control) -> tuple[Any, Any, Any]:
    return control.adapters.learner, control.adapters.judge, control.adapters.hosts


def report(control: Control, learner: dict[str, Any], judge: dict[str, Any], engine: dict[str, Any]) -> None:
    """Have the live parts say this from now on. AssertionError where they say other things than the real ones."""
    for part, said in zip(parts(control), (learner, judge, engine), strict=True):
        assert said.keys() == part.status().keys()
        part.status = lambda said=said: said
