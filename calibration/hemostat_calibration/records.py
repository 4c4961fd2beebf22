"""Token records: both models' log-probabilities of the same tokens, which all figures are computed from.

T is the number of output tokens of one request, K the candidates that the compressed side gave for each position,
J those that the reference gave. All log-probabilities are natural logarithms (nats), at temperature 1, of the model's
own distribution before any logits processor, penalty or truncation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Floats, Halves, Ids, Singles
from hemostat_calibration.reasoning import Thinking

SCHEMA_VERSION = 1

GRAMMAR = "grammar"
"""A constraint: a grammar that the engine enforces (structured output, a forced tool)."""
CONSTRAINTS = frozenset({GRAMMAR})


class Arm(StrEnum):
    """The randomised group of a request; NONE enters no comparison."""

    CONTROL = "control"
    TREATED = "treated"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Candidates:
    """The chosen ids of one model with their log-probabilities, one row for each position.

    ids: int32 [T, K]; -1 pads. No duplicate id in a row.
    logprobs: float64 [T, K], nats; -inf where padded.
    """

    ids: Ids
    logprobs: Floats


@dataclass(frozen=True, slots=True)
class Sampling:
    """The request's own decoding parameters, as the engine applied them."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class Shift:
    """The change that one profile makes at each position. Δz is the change of the logits, c the compressed model, r the
    reference.

    expected: float64 [T], E_r[Δz] in nats; NaN where unknown (a reference that gave only its top ids).
    log_normalizer: float64 [T], log E_c[e^Δz] in nats, from the engine; NaN where the engine did not report it.
    code: float64 [T, r], the profile's code of the record's features (`transform.code`), computed once; None if it
        was not computed.
    """

    expected: Floats
    log_normalizer: Floats
    code: Floats | None = None


@dataclass(frozen=True, slots=True)
class Features:
    """The compressed model's logits at a set of anchor ids, as the engine read them.

    anchors: `transform.anchors_digest` of the ids.
    values: float32 [T, N], centred over the anchors; a row of NaN where the engine gave none. In the learner's process
        float16, clipped to ±`rows.MAX_HALF`.
    """

    anchors: str
    values: Singles | Halves


@dataclass(frozen=True, slots=True)
class ExactDistances:
    """The distances of one model from the reference over the full vocabulary, by output position, computed on copies of
    both models.

    kl: float64 [T], KL(reference‖model), nats; infinite where the model gives no distribution at all (its logits are
        not finite). tv: float64 [T], total variation, 0 to 1; 1 there. top1: bool [T], both models' most likely id is
        the same.
    """

    kl: Floats
    tv: Floats
    top1: npt.NDArray[np.bool_]


MAX_RECOVERY_ERROR = 0.01
"""The largest KL(c‖ĉ) of one position with which a recovered distribution is used, nats. Where N is a little above d it
is about 0.001 on average, less than two engines with the same weights differ by; where N is below d, about 1."""


@dataclass(frozen=True, slots=True)
class RecoveredDivergence:
    """Divergences over the full vocabulary of r and ĉ, the compressed model's distribution as recovered from its logits
    at anchors (see `state_recovery`). float64 [T], nats unless stated otherwise; a row where nothing was recovered is
    NaN as a whole.

    kl_rc: KL(r‖ĉ). kl_cr: KL(ĉ‖r). js: Jensen–Shannon. tv: total variation, 0 to 1. entropy: H(ĉ).
    predicted: KL(c‖ĉ) as expected from the number of anchors, the output embedding and the rounding of logits.
    observed: KL(c‖ĉ) over the listed ids, which were not used for the recovery, and one bucket: a lower bound.
    """

    kl_rc: Floats
    kl_cr: Floats
    js: Floats
    tv: Floats
    entropy: Floats
    predicted: Floats
    observed: Floats

    @property
    def usable(self) -> npt.NDArray[np.bool_]:
        """It is True where both errors are at most `MAX_RECOVERY_ERROR`, bool [T]."""
        return (self.predicted <= MAX_RECOVERY_ERROR) & (self.observed <= MAX_RECOVERY_ERROR)


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """One scored request: what both models said of its output tokens.

    `hemostat.scoring.record_builder.build_record` makes it, and `record_checks.validate` checks it. The functions of
    `divergence` read it, the learners, and the judge of adapters.
    """

    vocab_size: int
    prompt_key: bytes
    """The digest of the prompt's token ids: the `unit` of a request whose conversation is not known."""
    output_ids: Ids
    """The tokens that the compressed model emitted, int32 [T]."""
    compressed: Candidates
    """The rows [T, K] of the compressed model's most likely ids, most likely first; the emitted token is among them
    when it was given: in its place, or last when it is not one of the most likely."""
    reference_at: Floats
    """The reference's log-probabilities at `compressed.ids`, float64 [T, K]; NaN where it gave none."""
    reference: Candidates
    """The rows [T, J] of the reference's own most likely ids, most likely first."""
    compressed_emitted: Floats
    """The log-probability of the emitted token under the compressed model, float64 [T]."""
    reference_emitted: Floats
    """The log-probability of the emitted token under the reference, float64 [T]."""
    reference_entropy: Floats | None = None
    """The exact entropy of the reference, float64 [T], nats; None if the reference gave only its top ids."""
    support: Ids | None = None
    """The number of ids that the request's constraint allows at each position, the emitted one among them, int32 [T].
    With it all log-probabilities, of both models, are conditional on the allowed ids, and no other id is in any row.
    It is None if every id is allowed.
    """
    constraint: str = ""
    """The kind of restriction of the ids: one of `CONSTRAINTS`; "" if `support` is None. Figures of constrained records
    are conditional, and are not pooled with others.
    """
    sampling: Sampling = field(default_factory=Sampling)
    arm: Arm = Arm.NONE
    requested: str | None = None
    """The profile version that the proxy asked the engine for."""
    applied: str | None = None
    """The profile version that the engine reports as applied; None is identity."""
    drawn_emitted: Floats | None = None
    """The log-probability of the emitted token under the distribution that it was drawn from at temperature 1, float64
    [T], if that was another model than `compressed`; None otherwise.
    """
    shifts: Mapping[str, Shift] = field(default_factory=dict)
    """The shifts by profile version: the served one, and any candidate under evaluation."""
    features: Features | None = None
    """The engine's features; None when it gave none."""
    reference_hidden: Singles | Halves | None = None
    """The reference's last hidden state h after the final norm, float32 [T, d], so that its logits are W h; None if it
    does not give it. In the learner's process float16, as `Features.values`.
    """
    position: int = 0
    """The number of output tokens before the first one of `output_ids`: above 0 where only the last ones of an output
    are scored."""
    context_tokens: int = 0
    """The number of tokens before the first one of `output_ids`, in the prompt and in the output; 0: not known."""
    thinking: Thinking | None = None
    """The thinking, in positions of the whole output; None if there is none, or if the markers are not known."""
    adapter: str | None = None
    """The version of the adapter that the engine added to the weights: then `compressed`, `compressed_emitted` and
    `features` come from the compressed model with the adapter. It is None if they come from the compressed model
    itself.
    """
    recovered: RecoveredDivergence | None = None
    """None if no distribution of the compressed model was recovered, or its records are conditional on `support`."""
    distances: Mapping[str, ExactDistances] = field(default_factory=dict)
    """The exact distances by profile version (`IDENTITY`: the compressed model itself); empty if no copy has scored the
    record.
    """
    request_id: str = ""
    route: str = ""
    model: str = ""
    label: str = ""
    kind: str = ""
    """The kind of traffic that the request belongs to, fixed before it went upstream; "" if none was determined."""
    conversation: bytes = b""
    """The salted digest of the conversation's first messages (or of the prompt); empty where none was determined."""
    template: bytes = b""
    """The digest of the cluster of alike prompts that the prompt belongs to (`statistics.templates`); empty where none
    was determined."""
    client: bytes = b""
    """The salted digest of what names the client; empty where nothing does."""
    compressed_model: str = ""
    """The digest or name of the compressed model."""
    reference_model: str = ""
    reference_dtype: str = ""
    engine_boot: str = ""
    engine: str = ""
    """The address of the engine that answered, host:port; "" if it is not known."""
    engine_drawn: bool = False
    """It is True if the engine was drawn at random, whatever the request is."""
    logprobs_mode: str = "raw_logprobs"
    schema: int = SCHEMA_VERSION

    @property
    def unit(self) -> bytes:
        """The key of what is either learned from or judged by, and counts once in a test: all requests of a template,
        else the conversation, else the prompt.
        """
        return self.template or self.conversation or self.prompt_key

    @property
    def tokens(self) -> int:
        return int(self.output_ids.shape[0])

    @property
    def partial(self) -> bool:
        """It is True if only the last tokens of the output are here. They are no sample of all its tokens."""
        return self.position > 0

    @property
    def top_k(self) -> int:
        return int(self.compressed.ids.shape[1])

    @property
    def domain(self) -> npt.NDArray[np.int64]:
        """The number of ids that can have a probability above 0 at each position, int64 [T]."""
        if self.support is None:
            return np.full(self.tokens, self.vocab_size, np.int64)
        return self.support.astype(np.int64)
