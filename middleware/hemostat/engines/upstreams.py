"""The engines that relays send requests to: what all relays report of them, and which of them are drained."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from hemostat.engines.configured import ConfiguredEngines
from hemostat.ipc.messages import EngineHealth
from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat.store.protocol import StoreWrites
from hemostat_calibration.errors import HemostatError

log = logging.getLogger("hemostat.engines")

STATE_KEY = "drained_engines"
"""The key of the drained engines in the store's state, a JSON list of names."""
UP = "up"


@dataclass(slots=True)
class UpstreamEngine:
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


class UpstreamEngines:
    """Owns which engines are drained. reported: what each connected relay has last reported. configured: the addresses
    that relays are believed to send requests to."""

    def __init__(
        self,
        reported: Callable[[], Iterable[list[EngineHealth]]],
        configured: ConfiguredEngines,
        writes: StoreWrites,
    ) -> None:
        self._reported = reported
        self.configured = configured
        self._writes = writes
        self.drained: frozenset[str] = frozenset()
        """The names of the engines that get no new requests."""

    def current(self) -> dict[str, UpstreamEngine]:
        """Returns the upstream's engines by name, in the order in which they are configured."""
        result: dict[str, UpstreamEngine] = {}
        for report in self._reported():
            for entry in self.configured.known(report):
                engine = result.setdefault(entry.engine, UpstreamEngine())
                engine.relays += 1
                engine.up += entry.state == UP
                engine.outstanding += entry.outstanding
                engine.requests += entry.requests
                engine.resent += entry.resent
                engine.ejections += entry.ejections
        return result

    def drain(self, engine: str, *, ends: bool = False) -> None:
        """Lets the engine get no new requests from now on (or again some, with `ends`). Raises HemostatError for an
        unknown one.

        One that is drained may be gone meanwhile, so that its drain can be ended whatever relays report.
        """
        known = self.current().keys() | self.drained
        if engine not in known:
            raise HemostatError(
                f"engine {engine[:100]!r} is not known; the engines are {', '.join(sorted(known)) or 'not known yet'}"
            )
        self.drained = self.drained - {engine} if ends else self.drained | {engine}
        log.warning("engine %s is %s", engine, "not drained any more" if ends else "drained")
        self.save()

    def save(self) -> None:
        """Queues a write of which engines are drained."""
        self._writes.set_state(STATE_KEY, json.dumps(sorted(self.drained)))

    def restore(self, stored: str | None) -> None:
        """Takes what an earlier run stored."""
        try:
            self.drained = frozenset(str(name) for name in json.loads(stored or "[]"))
        except (ValueError, TypeError) as error:
            log.error("stored drains of engines: %s; none is drained", error)

    def samples(self) -> Iterator[Sample]:
        for name, engine in self.current().items():
            labels = (name,)
            yield Sample(names.UPSTREAM_UP_RATIO, labels, engine.up / engine.relays)
            yield Sample(names.UPSTREAM_DRAINED, labels, name in self.drained)
            yield Sample(names.UPSTREAM_OUTSTANDING, labels, engine.outstanding)
