"""Full-vocabulary figures of compressed checkpoints on held-out texts, token by token, and their intervals."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tests.bench.recovery.figures import interval
from tests.support.transform import apply_to_all

from hemostat.checkpoints.checkpoint_digest import checkpoint_digest
from hemostat.checkpoints.texts import Text
from hemostat_calibration.profiles.adapter import adapter_layers
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.records import ExactDistances
from hemostat_engine.transform import HeldProfile
from hemostat_lab.adapters.distances import exact_distances
from hemostat_lab.models.copies import Copy

from .texts import Texts

Floats = npt.NDArray[np.float64]

ADAPTER_FILE, LOGITS_FILE = "adapter.profile", "logits.profile"
"""Beside a checkpoint: what it is measured with."""


class Meter:
    """Distances from the reference at the tokens of the held-out outputs. key: of what they depend on, for JSON."""

    def __init__(self, reference: Path, texts: Texts) -> None:
        self._reference = reference
        self._texts = texts
        self.key = [checkpoint_digest(str(reference), None)]
        self.key += [f"{len(text.prompt)} of {text.ids.tolist()}" for text in texts.heldout]

    def distances(self, checkpoint: Path) -> ExactDistances:
        """By token."""
        small = Copy.load(checkpoint)
        adapter, change = (_profile(checkpoint / name) for name in (ADAPTER_FILE, LOGITS_FILE))
        held = None if change is None else HeldProfile(change)
        result = []
        with torch.inference_mode(), small.adapted(None if adapter is None else adapter_layers(adapter)):
            for theirs, text in zip(self._reference_logits, self._texts.heldout, strict=True):
                ours = _logits(small, text)
                if held is not None:
                    ours = ours.float()
                    apply_to_all(held, ours)
                result.append(exact_distances(theirs, ours))
        return ExactDistances(
            *(np.concatenate([getattr(measured, part) for measured in result]) for part in ("kl", "tv", "top1"))
        )

    @cached_property
    def _reference_logits(self) -> list[torch.Tensor]:
        """By text, in the model's dtype: 1.3 GB with the benchmark's defaults, for half of a case's time."""
        whole = Copy.load(self._reference)
        return [_logits(whole, text) for text in self._texts.heldout]

    def mean(self, values: Floats, label: str) -> tuple[float, float, float]:
        """With a 95 % interval by topic."""
        return interval(self._texts.topics, values, np.ones_like(values), label)

    def recovered(self, before: Floats, after: Floats, label: str) -> tuple[float, float, float]:
        """The part of the KL before, with a 95 % interval by topic."""
        return interval(self._texts.topics, before - after, before, label)


def _profile(file: Path) -> CalibrationProfile | None:
    return CalibrationProfile.from_bytes(file.read_bytes()) if file.exists() else None


def _logits(copy: Copy, text: Text) -> torch.Tensor:
    """[n, V] at the positions that predict an output's token."""
    ids = torch.from_numpy(text.ids.astype(np.int64))[None]
    positions = torch.arange(len(text.prompt) - 1, len(text) - 1)
    with torch.inference_mode():
        result: torch.Tensor = copy.model(input_ids=ids, use_cache=False, logits_to_keep=positions).logits[0]
    return result
