"""Scopes: groups of requests that are learned from separately. A new one is an entry in `SCOPE_KEYS`.

What serves is decided by kind of traffic (`serving`), whatever was learned together: a profile that was learned of a
scope is tested in the kinds whose requests belong to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from hemostat_calibration.errors import HemostatError
from hemostat_calibration.records import TokenRecord

ALL = ""
"""The pooled scope: all requests."""
MAX_SCOPES = 16
"""The largest number of scopes in addition to the pooled one; they are the first ones seen. Requests of further scopes
count as pooled only.
"""

SCOPE_KEYS: Mapping[str, Callable[[TokenRecord], str]] = {
    "pooled": lambda record: ALL,
    "label": lambda record: record.label,
    "route": lambda record: record.route,
    "model": lambda record: record.model,
}
"""The function that names a record's scope, by the value of `calibration.scope`."""


class Scopes:
    """The scopes seen so far, `ALL` always among them. kind: `calibration.scope`."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._seen: dict[str, None] = {ALL: None}
        self.rolled_back: set[str] = set()
        """The scopes whose last profile was rolled back in some kind, and none has been promoted since."""

    def __contains__(self, scope: str) -> bool:
        return scope in self._seen

    def __iter__(self) -> Iterator[str]:
        return iter(self._seen)

    def follow(self, scope: str) -> bool:
        """Returns True if the scope is learned from separately. A new scope is, unless there are too many, or all is
        pooled.
        """
        if scope not in self._seen and self.kind != "pooled" and len(self._seen) <= MAX_SCOPES:
            self._seen[scope] = None
        return scope in self._seen

    def of(self, record: TokenRecord) -> str:
        """Returns the record's scope; `ALL` where it is not followed."""
        scope = SCOPE_KEYS[self.kind](record)
        return scope if self.follow(scope) else ALL

    def require(self, scope: str) -> None:
        """Checks a scope that an operator names: raises HemostatError if no request of it was seen."""
        if scope in self._seen:
            return
        if self.kind == "pooled":
            raise HemostatError(f"calibration.scope is pooled: there is no scope {scope[:80]!r}; leave it out")
        seen = ", ".join(sorted(other for other in self._seen if other != ALL)) or "none yet"
        raise HemostatError(f"no scored request was of the {self.kind} {scope[:80]!r}; seen: {seen}")
