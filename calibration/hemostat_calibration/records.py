"""What both models said about the same tokens: the one shape that flows from the scorer into everything else.

T is the number of output tokens of one request, K the candidates that the compressed side gave a position, J those
that the reference gave. All log-probabilities are natural logarithms (nats), at temperature 1, of the model's own
distribution before any logits processor, penalty or truncation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from hemostat_calibration.errors import InvalidRecordError

SCHEMA_VERSION = 1

Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]


class Arm(StrEnum):
    """The randomised group of a request; NONE enters no comparison."""

    CONTROL = "control"
    TREATED = "treated"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Candidates:
    """Chosen ids of one model with their log-probabilities, a row a position.

    ids: int32 [T, K]; -1 pads. No id twice in a row.
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
    """What one profile does at each position: Δz is the change of the logits, c the compressed model, r the reference.

    expected: float64 [T], E_r[Δz] in nats; NaN where unknown (a reference that gave only its top ids).
    log_normalizer: float64 [T], log E_c[e^Δz] in nats, from the engine; NaN where the engine did not say.
    """

    expected: Floats
    log_normalizer: Floats


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """One scored request."""

    vocab_size: int
    prompt_key: bytes
    """Digest of the prompt's token ids: learn and held-out are split by it, so that retries stay on one side."""
    output_ids: Ids
    """int32 [T]: the tokens that the compressed model emitted."""
    compressed: Candidates
    """[T, K]: the compressed model's most likely ids, most likely first; the emitted token is among them when it was
    given (it may stand behind the top K)."""
    reference_at: Floats
    """float64 [T, K]: the reference's log-probabilities at `compressed.ids`; NaN where it gave none."""
    reference: Candidates
    """[T, J]: the reference's own most likely ids, most likely first."""
    compressed_emitted: Floats
    """float64 [T]: log-probability of the emitted token under the compressed model."""
    reference_emitted: Floats
    """float64 [T]: the same under the reference."""
    reference_entropy: Floats | None = None
    """float64 [T], nats, exact; None when the reference gave only its top ids."""
    sampling: Sampling = field(default_factory=Sampling)
    arm: Arm = Arm.NONE
    requested: str | None = None
    """Profile version that the proxy asked the engine for."""
    applied: str | None = None
    """Profile version that the engine says it applied; None is identity."""
    shifts: Mapping[str, Shift] = field(default_factory=dict)
    """By profile version: the served one, and any candidate under evaluation."""
    request_id: str = ""
    route: str = ""
    model: str = ""
    label: str = ""
    compressed_model: str = ""
    """Digest or name of the compressed model."""
    reference_model: str = ""
    reference_dtype: str = ""
    engine_boot: str = ""
    logprobs_mode: str = "raw_logprobs"
    schema: int = SCHEMA_VERSION

    @property
    def tokens(self) -> int:
        return int(self.output_ids.shape[0])

    @property
    def top_k(self) -> int:
        return int(self.compressed.ids.shape[1])


def validate(record: TokenRecord) -> TokenRecord:
    """Return `record`, or raise InvalidRecordError naming the field and a countable reason.

    Checked once, where records enter the core: shapes, ids within the vocabulary and not repeated in a row, no NaN
    (but in `reference_at` and `shifts`, where it means unknown), log-probabilities not above 0, rows that sum to at
    most 1 within rounding.
    """
    raise InvalidRecordError("unimplemented", "validate is not written yet")
