"""What the comparison of outcomes needs to know of the profiles, and does to them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from hemostat.ipc.messages import REST_KIND
from hemostat.profiles.decisions import Reason
from hemostat.profiles.manager import ProfileManager
from hemostat.profiles.scopes import ALL
from hemostat.store.lease import Lease


class ServedKinds:
    """A `measurement.outcomes.ServedKinds`. Of several replicas, the one that leads takes a profile from a kind."""

    def __init__(self, profiles: ProfileManager, lease: Lease) -> None:
        self._profiles = profiles
        self._lease = lease

    def kinds(self) -> Collection[str]:
        return {*self._profiles.kinds.followed, REST_KIND}

    def version(self, kind: str) -> str | None:
        return self._profiles.serving.selected

    def is_held(self, kind: str) -> bool:
        return self._profiles.serving.selected is None

    def leave(self, kind: str, why: str, evidence: dict[str, Any]) -> None:
        if self._lease.is_last_leader:
            self._profiles.lifecycle.roll_back(ALL, Reason.HARM, f"{kind}: {why}", evidence)
