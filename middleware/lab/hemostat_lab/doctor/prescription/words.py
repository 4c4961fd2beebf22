"""The prescription in sentences. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hemostat_lab.doctor.causes.findings import clear, plus_minus

FOR = {
    "vllm": "vLLM serves it packed on NVIDIA's GPUs",
    "vllm-amd": "vLLM serves it packed on AMD's GPUs",
    "vllm-intel": "vLLM serves it packed on Intel's GPUs",
    "vllm-cpu": "vLLM serves it packed on CPUs",
    "any": "only its 4- and 8-bit layers can be served packed, the others are written dense",
}

ADAPTERS = (
    "An adapter is for a checkpoint that cannot be replaced, or that changes, or for traffic unlike these texts: on "
    "the model in docs/results.md error-compensated weights lose less for the same bytes."
)

Row = Mapping[str, Any]


def sentences(prescription: Row) -> list[str]:
    """What to store how, what it costs, and how that compares with uniform bits of no more bytes."""
    layers = len(prescription["plan"]["layers"])
    parts = ", ".join(f"{count} with {name}" for name, count in prescription["counts"].items())
    own, *others = prescription["compared"]
    requests = prescription["requests"]
    size = f"{prescription['tokens']} tokens of {requests} prompts"
    result = [
        f"Of {layers} linear layers: {parts}. That is {prescription['bytes']:,} of {prescription['budget']:,} bytes, "
        f"{prescription['bits_per_weight']:.2f} bits per weight; {FOR[prescription['target']]}.",
        *_by_module(prescription),
        *_unreached(prescription),
        f"Errors of rounding are compensated, on {prescription['learned_positions']:,} positions of "
        f"{prescription['learned_requests']} prompts; KLD is measured on other prompts.",
        f"Predicted: {prescription['predicted']:.4f} nats, and no choice of the same candidates is predicted below "
        f"{prescription['predicted_lower_bound']:.4f}. Measured: mean KLD "
        f"{plus_minus(own['mean_kld'], own['mean_kld_se_by_request'], requests)} nats on {size}.",
    ]
    for row in others:
        more, error = row["more_than_prescribed"], row["more_se_by_request"]
        verdict = f"{plus_minus(abs(more), error, requests)} {'more' if more > 0 else 'less'}"
        if not clear(more, error, requests):
            verdict += ", which is not clearly different"
        elif more < 0:
            verdict += ": take that instead"
        bytes_of = "" if row["bytes"] is None else f", {row['bytes']:,} bytes"
        mean = plus_minus(row["mean_kld"], row["mean_kld_se_by_request"], requests)
        result.append(f"{row['name']}{bytes_of}: {mean} nats, {verdict}.")
    return [*result, ADAPTERS]


def _by_module(prescription: Row) -> list[str]:
    """Which kinds of linear layer get more bits, where not all get the same."""
    bits: dict[str, list[int]] = {}
    for (module, _), (width, _, _) in widths(prescription).items():
        bits.setdefault(module, []).append(width)
    if len({width for widths in bits.values() for width in widths}) < 2:
        return []
    means = sorted(((sum(bit) / len(bit), module) for module, bit in bits.items()), reverse=True)
    return ["Mean bits by module: " + ", ".join(f"{module} {mean:.1f}" for mean, module in means) + "."]


def _unreached(prescription: Row) -> list[str]:
    names = prescription["unreached"]
    if not names:
        return []
    return [
        f"No token of the texts reached {len(names)} of the layers, such as {names[0]}: what they lose is unknown, and "
        "taken to be the median of the layers of their kind that were reached, per weight. More prompts say more."
    ]


def widths(prescription: Row) -> dict[tuple[str, str], tuple[int, int | None, float]]:
    """(module, layer) -> bits, group size, sparsity of the plan, for layers whose names have a number."""
    result = {}
    for name, plan in prescription["plan"]["layers"].items():
        parts = name.split(".")
        number = next((n for n, part in enumerate(parts) if part.isdecimal()), None)
        if number is not None:
            cell = ".".join(parts[number + 1 :]), parts[number]
            result[cell] = plan["bits"], plan["group_size"], plan["sparsity"]
    return result
