"""The state of a gate in the store: what is compared, the evidence, and the verdict."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from hemostat.store.protocol import BlobKey
from hemostat_calibration.gate.live import LiveState

BLOB_KEY = BlobKey("gate")
"""The key of the gate in the store's blobs: some 100 kB."""
SCHEMA = 1
MAX_UNITS = 20_000
"""The largest number of units that are remembered, so that none counts twice. With so many, a gate ends undecided."""
DIGEST_BYTES = 8

NONE, RUNNING, PASS, FAIL, UNDECIDED = "none", "running", "pass", "fail", "undecided"
STATES = (NONE, RUNNING, PASS, FAIL, UNDECIDED)
"""The states of the gate, as JSON and the metric name them. `undecided` is the end of a gate that cannot decide."""


@dataclass(frozen=True, slots=True)
class Subject:
    """The subject of a gate. candidate: URL[#NAME] of its server. expect: same or other. began: Unix seconds."""

    candidate: str
    expect: str
    began: float


@dataclass(slots=True)
class StoredGate:
    """A gate as it is stored.

    state, why, decided: one of `STATES`, the sentence, and when it ended, Unix seconds; 0: it has not. identity: the
    candidate's `Identity` as JSON; "" before it has answered. counted: digests of the units. tokens: that the candidate
    has read and written. failures: how often it failed, by reason. notes: the same in words. in_a_row: failures in a
    row. log_ratio: the sum over units of the mean of log(stable/candidate) on the stable model's tokens, nats, and
    their number.
    """

    subject: Subject
    evidence: LiveState
    state: str = RUNNING
    why: str = ""
    decided: float = 0.0
    identity: str = ""
    counted: dict[bytes, None] = field(default_factory=dict)
    tokens: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    in_a_row: int = 0
    log_ratio: tuple[float, int] = (0.0, 0)


@dataclass(frozen=True, slots=True)
class Stored:
    """All that is stored. configured: the candidate that the settings named last, and what was expected of it; ""
    without one. A gate that an operator has ended does not begin again with the next process."""

    gate: StoredGate | None = None
    configured: str = ""


def digest_of(kind: str, unit: bytes) -> bytes:
    """Returns the digest by which a unit is remembered: it counts once in each kind."""
    return hashlib.blake2b(unit, digest_size=DIGEST_BYTES, key=hashlib.blake2b(kind.encode()).digest()).digest()
