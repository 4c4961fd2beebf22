"""The keys of the guard's tests, and their spelling in the store."""

from __future__ import annotations

from dataclasses import dataclass

_WATCH = "serving"
_CANDIDATE = "candidate "


@dataclass(frozen=True, slots=True)
class GuardKey:
    """The key of a test of the guard: the test of a candidate, or the watch of what serves.

    version: the candidate's; None: the watch.

    >>> WATCH.stored, GuardKey("0123abcd").stored
    ('serving', 'candidate 0123abcd ')
    >>> GuardKey.parse("candidate 0123abcd ")
    GuardKey(version='0123abcd')
    """

    version: str | None

    @property
    def stored(self) -> str:
        """The guard's name for the test. The space at its end is in what earlier versions have stored, too: the scope
        followed it, and an empty one was all traffic."""
        return _WATCH if self.version is None else f"{_CANDIDATE}{self.version} "

    @classmethod
    def parse(cls, stored: str) -> GuardKey | None:
        """Returns the key that is spelled so; None if this version has no such test."""
        if stored == _WATCH:
            return WATCH
        version = stored.removeprefix(_CANDIDATE).removesuffix(" ")
        key = cls(version)
        return key if version and " " not in version and key.stored == stored else None


WATCH = GuardKey(None)
"""The key of the tests of what serves."""
