"""One engine of the upstream, with all that the control process knows of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from hemostat.engines.messages import RankReport
from hemostat.ipc.messages import EngineHealth
from hemostat.reference.server import VllmServer

UP = "up"


class EnginePart(Protocol):
    """The part of an engine that one other part of the control process keeps, until the engine leaves."""

    async def close(self) -> None:
        """Ends it: the engine has left."""
        ...


class LiveReports(Protocol):
    """The live reports of an engine's plugin; see `PluginReports`, which are the ones of all engines."""

    def known(self, now: float) -> bool:
        """Returns False while it is not known which of the engines that report is meant."""
        ...

    def live(self, now: float) -> Sequence[RankReport]:
        """Returns the last report of each of its ranks; none where it does not report."""
        ...


@dataclass(slots=True)
class Health:
    """The figures of one engine from all relays together, each of which finds out for itself whether an engine
    answers.
    """

    relays: int = 0
    up: int = 0
    """The number of relays that send it requests, or would if it were not drained."""
    outstanding: int = 0
    """The number of requests in progress."""
    requests: int = 0
    resent: int = 0
    """The number of requests that were then sent again, to another engine or to this one."""
    ejections: int = 0

    def update(self, entry: EngineHealth) -> None:
        """Adds the figures of one relay."""
        self.relays += 1
        self.up += entry.state == UP
        self.outstanding += entry.outstanding
        self.requests += entry.requests
        self.resent += entry.resent
        self.ejections += entry.ejections


P = TypeVar("P", bound=EnginePart)


class Engine:
    """One engine, from when relays report it until they do not any more. It owns its parts, at most one of each class.

    name: host:port, or "" for whatever answers at the only address. reports: of its plugin. connect: returns a client
    of the engine, whose requests take at most so many seconds. It raises ReferenceFailure where the address is not one
    of the upstream any more.
    """

    def __init__(self, name: str, reports: LiveReports, connect: Callable[[float], VllmServer]) -> None:
        self.name = name
        self.reports = reports
        self.connect = connect
        self.health = Health()
        """The figures that relays report of it."""
        self._parts: dict[type[EnginePart], EnginePart] = {}

    def report(self, now: float) -> RankReport | None:
        """Returns what its plugin reports; None if it is not known which engine that is, or if there are several."""
        live = self.reports.live(now)
        return live[0] if len({report.boot_id for report in live}) == 1 else None

    def part(self, kind: type[P]) -> P | None:
        """Returns its part of this class; None if it has none."""
        part = self._parts.get(kind)
        return part if isinstance(part, kind) else None

    def add(self, part: EnginePart) -> None:
        """Adds a part, which ends with the engine."""
        self._parts[type(part)] = part

    async def end(self, kind: type[EnginePart]) -> None:
        """Ends its part of this class, if it has one."""
        if (part := self._parts.pop(kind, None)) is not None:
            await part.close()

    async def close(self) -> None:
        """Ends all of its parts."""
        for kind in list(self._parts):
            await self.end(kind)
