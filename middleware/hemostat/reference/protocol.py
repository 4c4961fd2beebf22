"""What a reference model is asked and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Floats, Ids
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.records import Candidates

NO_CODES: Mapping[str, npt.NDArray[np.float32]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class ReferenceInfo:
    """Who answers. `digest` identifies the weights (a hash of the checkpoint's files or the server's model card)."""

    model: str
    digest: str
    dtype: str
    vocab_size: int
    full_vocabulary: bool
    """True: entropies and expected shifts are exact."""
    hidden_size: int = 0
    """d of the hidden states that it hands out, h with z = W h (a constant apart); 0: it hands out none."""
    hidden_detail: str = ""
    """Why it hands out none."""
    folder: Path | None = None
    """Where the checkpoint's files are, on this machine."""


@dataclass(frozen=True, slots=True)
class ReferenceScores:
    """The reference's view of T output positions.

    at: float64 [T, K], log-probabilities at the asked ids; NaN where not given.
    top: the reference's own [T, J] most likely ids, most likely first.
    emitted: float64 [T], log-probability of the output token.
    entropy: float64 [T] in nats or None.
    expected_shift: profile version -> float64 [T], E_r[Δz]; empty when the reference gives only its top ids.
    hidden: float32 [T, d], the last hidden state after the final norm: the logits are W h, W the output embedding. None
        unless asked for and to be had (`ReferenceInfo.hidden_size`).
    """

    at: Floats
    top: Candidates
    emitted: Floats
    entropy: Floats | None = None
    expected_shift: dict[str, Floats] = field(default_factory=dict)
    hidden: npt.NDArray[np.float32] | None = None


class ReferenceFailure(Exception):
    """The reference failed; `reason` is a short, bounded word for counting (down, timeout, short_answer, ...)."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Reference(Protocol):
    """One reference model. All methods raise ReferenceFailure and nothing else."""

    async def start(self) -> ReferenceInfo:
        """Load or connect; returns when it can score."""

    async def score(
        self,
        prompt: npt.NDArray[np.int32],
        output: npt.NDArray[np.int32],
        ids: Ids,
        profiles: tuple[CalibrationProfile, ...] = (),
        codes: Mapping[str, npt.NDArray[np.float32]] = NO_CODES,
        hidden: bool = False,
        *,
        reshaped: bool = False,
        adapter: str = "",
    ) -> ReferenceScores:
        """Score `output` after `prompt`, also at `ids`, int32 [T, K] (-1 pads).

        codes: of contextual profiles, by version: float32 [T, r], y with Δz = clip(up · y). hidden: hand out hidden
        states, where there are any. reshaped: compute it in another shape (of batch and prefill) than usual, for the
        noise floor. adapter: one of `adapters`, to score with; "no_adapter" where it has gone.
        """

    async def adapters(self) -> frozenset[str]:
        """Names of the LoRA adapters that it can score with, now."""

    async def render(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a chat under this model's own template (to compare the two models' vocabularies)."""

    async def tokenize(self, text: str) -> list[int]: ...

    async def close(self) -> None: ...
