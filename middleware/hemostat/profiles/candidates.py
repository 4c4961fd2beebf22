"""Candidates: profiles that are to be tested, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from hemostat.profiles.guard_keys import GuardKey, candidate_key
from hemostat_calibration.profiles.families import FAMILIES


class Origin(StrEnum):
    """The origin of a candidate that no learner has proposed. The values are stored."""

    IMPORT = "import"
    """An operator has imported it."""
    SERVING = "serving"
    """It serves other kinds of traffic already."""


@dataclass(frozen=True, slots=True)
class Proposed:
    """The origin of a candidate that a learner of this family has proposed."""

    family: str


Source = Origin | Proposed


def stored_source(source: Source) -> str:
    """Returns the spelling of a source in the store and in reports: a family's name, or the value of an `Origin`.

    >>> stored_source(Origin.IMPORT), stored_source(Proposed("contextual"))
    ('import', 'contextual')
    """
    return source.family if isinstance(source, Proposed) else source.value


def read_source(stored: str) -> Source:
    """Returns the source that is spelled so.

    >>> read_source("import"), read_source("contextual")
    (<Origin.IMPORT: 'import'>, Proposed(family='contextual'))
    """
    return Origin(stored) if stored in set(Origin) else Proposed(stored)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A profile that is to be tested.

    proposal: the number of its proposal. A later one has a larger number.
    """

    version: str
    source: Source
    proposal: int = field(default=0, compare=False)

    @property
    def priority(self) -> int:
        """The priority of its family: a lower one is tested first."""
        family = FAMILIES.get(self.source.family) if isinstance(self.source, Proposed) else None
        return family.queue_priority if family is not None else 0

    @property
    def test(self) -> GuardKey:
        """The key of its tests."""
        return candidate_key(self.version)
