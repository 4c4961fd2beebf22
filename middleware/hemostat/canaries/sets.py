"""The sets of canaries that are in force, and in the store: the base model's, and one of each adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hemostat.store.protocol import BlobKey, StoreWrites
from hemostat_calibration import state_codec
from hemostat_calibration.canaries import CanarySet

BLOB_KEY = BlobKey("canaries")
"""The key of the sets in the store's blobs."""
SCHEMA = 2
MAX_SETS = 33
"""The largest number of sets, for the base model and adapters: beyond it the one that was taken first is forgotten."""


@dataclass(frozen=True, slots=True)
class _Stored:
    sets: Mapping[str, CanarySet] = field(default_factory=dict)
    """The sets by served name, in the order in which they were taken: the base model's is the first."""


class Sets:
    """Owns the sets."""

    def __init__(self, writes: StoreWrites) -> None:
        self._writes = writes
        self._sets: dict[str, CanarySet] = {}

    @property
    def base(self) -> CanarySet | None:
        return next(iter(self._sets.values()), None)

    def of(self, model: str) -> CanarySet | None:
        return self._sets.get(model)

    def put(self, taken: CanarySet) -> None:
        self._sets[taken.origin.model] = taken
        if len(self._sets) > MAX_SETS:
            del self._sets[list(self._sets)[1]]
        self._save()

    def clear(self) -> None:
        self._sets.clear()
        self._save()

    def restore(self, stored: bytes) -> None:
        """Takes what an earlier run stored. Raises InvalidArgumentError."""
        self._sets = dict(state_codec.decode(_Stored, stored, SCHEMA).sets)

    def _save(self) -> None:
        self._writes.put_blob(BLOB_KEY, state_codec.encode(_Stored(self._sets), SCHEMA))
