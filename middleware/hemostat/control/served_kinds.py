"""The part of the profiles that the comparison of outcomes reads, and what it does to them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from hemostat.profiles.decisions import Reason
from hemostat.profiles.manager import ProfileManager


class ServedKinds:
    """The `measurement.outcomes.ServedKinds` that the profile manager stands behind."""

    def __init__(self, profiles: ProfileManager) -> None:
        self._profiles = profiles

    def kinds(self) -> Collection[str]:
        return self._profiles.serving.kinds.keys()

    def version(self, kind: str) -> str | None:
        return self._profiles.serving.version_by_kind.get(kind)

    def is_operators(self, kind: str) -> bool:
        state = self._profiles.serving.kinds.get(kind)
        return state is not None and (bool(state.held) or state.pinned)

    def leave(self, kind: str, why: str, evidence: dict[str, Any]) -> None:
        if not self._profiles.serving.kinds[kind].pinned:
            self._profiles.lifecycle.roll_back(kind, Reason.OUTCOMES, why, evidence)
