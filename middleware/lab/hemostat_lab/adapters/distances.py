"""Exact distances between two models' predictions, at full vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hemostat_calibration.records import ExactDistances

MAX_ELEMENTS = 1 << 24
"""The number of elements of one float32 log-softmax (64 MiB)."""


def exact_distances(reference: Any, model: Any) -> ExactDistances:
    """Returns the distances of the model from the reference, from their logits [n, V] at the same positions: torch
    tensors or numpy arrays. Raises ValueError if the shapes differ or are not [n, V]."""
    ours, theirs = (torch.as_tensor(logits) for logits in (reference, model))
    if ours.shape != theirs.shape or ours.ndim != 2:
        raise ValueError(f"logits have the shapes {list(ours.shape)} and {list(theirs.shape)}: both must be [n, V]")
    kl: list[torch.Tensor] = []
    tv: list[torch.Tensor] = []
    top1: list[torch.Tensor] = []
    rows = max(1, MAX_ELEMENTS // max(1, ours.shape[1]))
    with torch.no_grad():
        for r, m in zip(ours.split(rows), theirs.split(rows), strict=True):
            log_r = torch.log_softmax(r.float(), dim=-1)
            log_m = torch.log_softmax(m.to(log_r.device).float(), dim=-1)
            p = log_r.exp()
            # Where the reference gives an id no probability, the id counts 0.
            terms = torch.where(p > 0, p * (log_r - log_m), 0.0)
            kl.append(terms.sum(-1, dtype=torch.float64).clamp_min(0.0))
            tv.append(0.5 * (p - log_m.exp()).abs().sum(-1, dtype=torch.float64))
            top1.append(log_r.argmax(-1) == log_m.argmax(-1))
    return ExactDistances(_numpy(kl), _numpy(tv), _numpy(top1).astype(np.bool_))


def _numpy(parts: list[torch.Tensor]) -> np.ndarray[Any, Any]:
    values: np.ndarray[Any, Any] = torch.cat(parts).cpu().numpy() if parts else np.zeros(0)
    return values
