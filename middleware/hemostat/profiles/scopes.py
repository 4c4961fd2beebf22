"""Scopes: groups of requests that may have a profile of their own. A new kind of scope is an entry in `SCOPE_KEYS`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from hemostat_calibration import guard
from hemostat_calibration.errors import HemostatError
from hemostat_calibration.records import TokenRecord

ALL = ""
"""The pooled scope: all requests whose scope has no profile of its own."""
MAX_SCOPES = 16
"""Scopes beside the pooled one; the first ones seen. Requests of further ones count as pooled."""
MAX_SCOPE_PROFILES = 4
"""Scopes with a profile of their own at a time. With the pooled profile, two candidates and the probe these are as many
profiles as an engine holds."""

SCOPE_KEYS: Mapping[str, Callable[[TokenRecord], str]] = {
    "pooled": lambda record: ALL,
    "label": lambda record: record.label,
    "route": lambda record: record.route,
    "model": lambda record: record.model,
}
"""`calibration.scope` -> the name of a record's scope."""


@dataclass(slots=True)
class ScopeState:
    """What serves the requests of one scope."""

    selected: str | None = None
    """The scope's own profile; None: identity, or for a scope other than `ALL` the pooled profile."""
    window: int = guard.DEFAULT_WINDOW
    """Length of the windows in which `selected` is watched, in held-out requests."""
    rolled_back: bool = False
    """The last profile was rolled back, and none has been promoted since."""


class Scopes:
    """The scopes seen so far, `ALL` always among them. kind: `calibration.scope`."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._states: dict[str, ScopeState] = {ALL: ScopeState()}

    def __contains__(self, scope: str) -> bool:
        return scope in self._states

    def __iter__(self) -> Iterator[str]:
        return iter(self._states)

    def __getitem__(self, scope: str) -> ScopeState:
        return self._states[scope]

    def items(self) -> list[tuple[str, ScopeState]]:
        return list(self._states.items())

    def follow(self, scope: str) -> ScopeState | None:
        """The scope's state, created when the scope is new; None for one scope too many, or where all is pooled."""
        if scope not in self._states and self.kind != "pooled" and len(self._states) <= MAX_SCOPES:
            self._states[scope] = ScopeState()
        return self._states.get(scope)

    def of(self, record: TokenRecord) -> str:
        """The record's scope; `ALL` where it is not followed."""
        scope = SCOPE_KEYS[self.kind](record)
        return scope if self.follow(scope) is not None else ALL

    def named(self, scope: str) -> ScopeState:
        """A scope that an operator names; HemostatError where no request of it was seen."""
        if scope not in self._states:
            if self.kind == "pooled":
                raise HemostatError(f"calibration.scope is pooled: there is no scope {scope[:80]!r}; leave it out")
            seen = ", ".join(sorted(other for other in self._states if other != ALL)) or "none yet"
            raise HemostatError(f"no scored request was of the {self.kind} {scope[:80]!r}; seen: {seen}")
        return self._states[scope]

    def own_profiles(self) -> dict[str, str]:
        """Version by scope, of the scopes other than `ALL` that have a profile of their own."""
        return {
            scope: state.selected
            for scope, state in self._states.items()
            if scope != ALL and state.selected is not None
        }

    def selected(self) -> set[str]:
        """Versions that are selected in any scope."""
        return {state.selected for state in self._states.values() if state.selected is not None}
