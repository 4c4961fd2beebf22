"""The requests to a reference model, its answers, and how it fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hemostat_calibration.allowed_sets import AllowedSets
from hemostat_calibration.arrays import Floats, Ids
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.records import Candidates, RecoveredDivergence


class Offer(StrEnum):
    """The way in which a reference scores."""

    MODEL = "model"
    """A model in process: the full vocabulary."""
    STATES = "states"
    """It gives the final hidden states of a pooling server: with the output embedding, that is the full vocabulary."""
    LISTS = "lists"
    """The top ids of a generating server (`prompt_logprobs`)."""


@dataclass(frozen=True, slots=True)
class ReferenceInfo:
    """The identity and abilities of a reference."""

    model: str
    digest: str
    """The identity of the weights: a hash of the checkpoint's files, or of the server's model card."""
    dtype: str
    vocab_size: int
    full_vocabulary: bool
    """If it is True, entropies and expected shifts are exact."""
    hidden_size: int = 0
    """The size d of the hidden states h that it returns, if the logits are W h up to a constant; 0: it returns none."""
    hidden_detail: str = ""
    """The reason why it returns none."""
    folder: Path | None = None
    """The checkpoint's folder on this machine."""
    device: str = field(default="", compare=False)
    """The device that was chosen for it, and why; "" if the configuration names one."""
    offer: Offer = Offer.MODEL
    figures: str = ""
    """The figures that follow, in a few words; "" for the figures that `full_vocabulary` says."""
    exact_with: str = ""
    """The advice for the operator on how to get exact figures, in the imperative; "" if they are exact."""
    probe: tuple[float, ...] = ()
    """The log-probabilities of the tokens of fixed texts, nats (`probed_scores`), if `digest` does not say what the
    weights are: a generating server names its model, and may load others under the same name."""

    @property
    def figures_follow(self) -> str:
        """The figures that follow from this reference, in one line."""
        if self.full_vocabulary:
            how = {Offer.STATES: "hidden states of a pooling server", Offer.MODEL: "in process"}[self.offer]
            return f"exact: full vocabulary ({how})"
        return f"bounds: top ids only{self.figures and f' ({self.figures})'}"


@dataclass(frozen=True, slots=True)
class CompressedLogits:
    """The logits that the engine reported of the compressed model. If there are more anchors than hidden states have
    numbers, its whole distribution follows (see `state_recovery`).

    anchors: int32 [N]. features: float32 [T, N], its logits there, centred; a row of NaN where unknown.
    logprobs: float64 [T, K], its candidates' log-probabilities, at the `ids` that are scored.
    """

    anchors: Ids
    features: npt.NDArray[np.float32]
    logprobs: Floats


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """T output tokens after P prompt tokens, and what is wanted of them.

    `scoring.reference_call.ReferenceCall` makes it of a capture, and the noise floor, the canaries and the doctor make
    it of texts of their own. A `Reference` reads it, and `scoring.record_builder`.
    """

    prompt: Ids
    """The ids of the prompt, int32 [P], P ≥ 1."""
    output: Ids
    """The ids of the output, int32 [T], T ≥ 1."""
    ids: Ids
    """The ids, int32 [T, K], -1 pads, whose log-probabilities are wanted in addition to the output's."""
    profiles: tuple[CalibrationProfile, ...] = ()
    """The profiles whose E_r[Δz] is wanted."""
    codes: Mapping[str, Floats] = field(default_factory=dict)
    """The codes of the contextual profiles, by version: float64 [T, r], y with Δz = clip(up · y)."""
    hidden: bool = False
    """It is True if hidden states are to be returned, where available."""
    reshaped: bool = False
    """It is True if scores are to be computed in another shape (of batch and prefill) than usual, for the noise
    floor."""
    adapter: str = ""
    """The one of `Reference.adapters` to score with (on a server, any served name). The failure is NO_ADAPTER if it is
    no longer served."""
    allowed: AllowedSets | None = None
    """The ids that scores are conditional on, of T positions and this vocabulary: all others have the log-probability
    -inf, and are not in `top`. GRAMMAR_NEEDS_FULL_VOCABULARY of a reference that gives only its top ids."""
    compressed: CompressedLogits | None = None
    """The compressed model's logits, with which `recovered` is returned if hidden states are available; not together
    with `allowed`."""

    @property
    def tokens(self) -> int:
        """The number of tokens of prompt and output, P + T."""
        return len(self.prompt) + len(self.output)


@dataclass(frozen=True, slots=True)
class ReferenceScores:
    """The reference's scores of T output positions; log-probabilities and entropies in nats.

    A `Reference` makes it, `scoring.record_builder.build_record` reads it, and whoever else has made a `ScoreRequest`.

    at: float64 [T, K], log-probabilities at the requested ids; NaN where not given.
    top: the reference's own [T, J] most likely ids, most likely first.
    emitted: float64 [T], log-probability of the output token.
    entropy: float64 [T], or None if only the top ids are known.
    expected_shift: profile version -> float64 [T], E_r[Δz]; empty when the reference gives only its top ids.
    hidden: float32 [T, d], the last hidden state after the final norm: the logits are W h, W the output embedding. None
        unless requested and available (`ReferenceInfo.hidden_size`).
    recovered: distances from the compressed model's recovered distribution; None unless requested and available.
    """

    at: Floats
    top: Candidates
    emitted: Floats
    entropy: Floats | None = None
    expected_shift: dict[str, Floats] = field(default_factory=dict)
    hidden: npt.NDArray[np.float32] | None = None
    recovered: RecoveredDivergence | None = None


class FailureReason(StrEnum):
    """The values of the label `reason` on metrics, behind `reference_`."""

    DOWN = "down"
    """It cannot be reached, or its process has ended."""
    TIMEOUT = "timeout"
    BUSY = "busy"
    """The server answered 429 or 503."""
    REFUSED = "refused"
    """The server answered 400 or 422."""
    UNAUTHORIZED = "unauthorized"
    """The server answered 401 or 403."""
    HTTP_ERROR = "http_error"
    """The server answered with another status that is not a success."""
    BAD_ANSWER = "bad_answer"
    """The answer cannot be decoded."""
    SHORT_ANSWER = "short_answer"
    """The answer lacks positions or ids."""
    TOO_LARGE = "too_large"
    """The answer is longer than any answer to the request; it was not read to its end."""
    HEAD = "head"
    """The output head of a pooling server's model cannot be read from `reference.folder`, or is another model's."""
    REVISION = "revision"
    """The server's hidden states, or its scores of fixed texts, no longer belong to the model that was checked."""
    LOGPROBS_MODE = "logprobs_mode"
    """The server does not return log-probabilities of the model itself."""
    PROTOCOL = "protocol"
    """The reference's process answered something unexpected."""
    NO_MODEL = "no_model"
    """The server does not serve the model."""
    NO_ADAPTER = "no_adapter"
    """It does not serve the LoRA adapter."""
    NO_CHAT_TEMPLATE = "no_chat_template"
    VOCABULARY = "vocabulary"
    """A token id is outside the vocabulary, or the vocabulary's size is unknown."""
    EMPTY = "empty"
    """There is no prompt token or no output token."""
    TOO_LONG = "too_long"
    """The text is longer than the context of the reference."""
    GRAMMAR_NEEDS_FULL_VOCABULARY = "grammar_needs_full_vocabulary"
    """It gives only its top ids, which do not determine its distribution over the ids that a grammar allows."""
    CODE = "code"
    """A profile's code has the wrong shape."""
    NOT_INSTALLED = "not_installed"
    """A package that the backend needs is missing."""
    OUT_OF_MEMORY = "out_of_memory"
    MODEL_ERROR = "model_error"
    """The model raised any other exception."""


class ReferenceFailure(Exception):
    """The reference failed, for `reason`."""

    def __init__(self, reason: FailureReason, message: str) -> None:
        super().__init__(message)
        self.reason = FailureReason(reason)


class Reference(Protocol):
    """One reference model. All methods raise ReferenceFailure and nothing else."""

    async def start(self) -> ReferenceInfo:
        """Loads the model or connects to its server; returns when it can score."""

    async def score(self, request: ScoreRequest) -> ReferenceScores:
        """Returns the scores of the request's output."""

    async def adapters(self) -> frozenset[str]:
        """Names of the LoRA adapters that it can score with now."""

    async def render(self, messages: list[dict[str, str]]) -> list[int]:
        """Returns the token ids of a chat under this model's own template, to compare the two models;
        NO_CHAT_TEMPLATE."""

    async def tokenize(self, text: str) -> list[int]:
        """Returns the token ids without special tokens."""

    async def close(self) -> None: ...
