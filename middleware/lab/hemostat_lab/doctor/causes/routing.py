"""Mixtures of experts: which experts both models choose for the same tokens, and what other choices cost. Torch.

The compressed model's router reads other hidden states, and may choose other experts. What that costs is measured by
computing the compressed model with the reference's choices and weights: `won` is how much KL(r‖c) falls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hemostat_lab.doctor.checkpoints import CheckpointPair
from hemostat_lab.doctor.kl_meter import KlMeter, Text
from hemostat_lab.doctor.pair import json_number
from hemostat_lab.models.experts import Routing, experts_of, routed

MAX_NAMED = 16
"""Experts that no token reached are named up to so many, by layer."""


def routing_report(pair: CheckpointPair, texts: Sequence[Text]) -> dict[str, Any]:
    """The report's `routing`, at all positions of `texts`; `layers` is empty where a model has no experts, or not as
    many as the other."""
    experts, others = experts_of(pair.reference_model), experts_of(pair.compressed_model)
    if not experts or list(map(len, experts)) != list(map(len, others)):
        return {"layers": []}
    with torch.inference_mode():
        meter = KlMeter(pair.reference_model, texts, pair.device)
        ours: list[list[Routing]] = [[] for _ in experts]
        with routed(pair.reference_model, lambda n, made: _kept(ours[n], made)):
            meter.prepare()
        theirs: list[list[Routing]] = [[] for _ in experts]
        with routed(pair.compressed_model, lambda n, made: _kept(theirs[n], made)):
            base = meter.measure(pair.compressed_model)
        calls = [iter(of_layer) for of_layer in ours]
        with routed(pair.compressed_model, lambda n, _: next(calls[n])):
            forced = meter.measure(pair.compressed_model)
    won = meter.sample.mean(base - forced)
    return {
        "tokens": len(base),
        "requests": meter.sample.requests,
        "mean_kld": json_number(base.mean()),
        "won_nats": json_number(won.value),
        "won_se_by_request": json_number(won.by_request),
        "layers": [_layer_row(n, len(experts[n]), ours[n], theirs[n]) for n in range(len(experts))],
    }


def _kept(into: list[Routing], made: Routing) -> Routing:
    into.append(made)
    return made


def _layer_row(layer: int, experts: int, ours: Sequence[Routing], theirs: Sequence[Routing]) -> dict[str, Any]:
    """Of one layer with experts. positions: of all texts. same: share of the positions with the same set of experts.
    shared: mean share of a position's experts that are the same. loads: share of all choices that fell on each expert.
    """
    chosen = [torch.cat([made for made, _ in of_model]).cpu().numpy() for of_model in (ours, theirs)]
    per_token = chosen[0].shape[1]
    hits = [np.zeros((len(choice), experts), bool) for choice in chosen]
    for choice, hit in zip(chosen, hits, strict=True):
        np.put_along_axis(hit, choice, True, axis=1)
    common = (hits[0] & hits[1]).sum(1)
    loads = [hit.sum(0) / hit.sum() for hit in hits]
    unreached = [np.nonzero(load == 0.0)[0] for load in loads]
    return {
        "layer": layer,
        "experts": experts,
        "per_token": per_token,
        "positions": len(chosen[0]),
        "same": json_number((common == per_token).mean()),
        "shared": json_number(common.mean() / per_token),
        "loads": {
            name: [json_number(x) for x in load] for name, load in zip(("reference", "compressed"), loads, strict=True)
        },
        "unreached": {
            name: {"experts": len(numbers), "first": numbers[:MAX_NAMED].tolist()}
            for name, numbers in zip(("reference", "compressed"), unreached, strict=True)
        },
    }
