"""The addresses of engines that the control process may contact, by its own configuration.

Relays say which engines they send requests to. The control process sends those engines the upstream's API key, so it
believes a relay only where its own configuration has the address, or where the configured name resolves to it here.
What relays report of any other address is ignored.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from hemostat.config.models import MAX_ENGINES, Upstream
from hemostat.ipc.messages import EngineHealth
from hemostat.ipc.origin import Lookup, parse_origin
from hemostat_calibration.messages import shown_address

log = logging.getLogger("hemostat.engines")

RESOLVE_SECONDS = 5.0
"""The pause between two look-ups of a name, as long as a relay's."""
SOON_SECONDS = 1.0
"""The shortest pause between two look-ups, when a relay has reported an address that the last one did not have."""
KEEP_SECONDS = 60.0
"""The seconds that an address is believed after the last look-up that had it: relays may have asked another name
server."""
MAX_IGNORED = 64
"""The largest number of addresses that are remembered as ignored; no further ones are named in the log."""


class ConfiguredEngines:
    """Owns which addresses are engines of the configured upstream. clock: monotonic seconds."""

    def __init__(self, upstream: Upstream, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lookup = Lookup(parse_origin(upstream.servers[0]), log) if upstream.resolves else None
        """The part that resolves the name; None if the addresses themselves are configured."""
        self._names = frozenset(() if upstream.resolves else (parse_origin(url).name for url in upstream.servers))
        self._resolved: dict[str, float] = {}
        """The time when a look-up last had an address, by address."""
        self._asked_for: set[str] = set()
        """The addresses that relays have reported since the last look-up began, and that no look-up has had."""
        self._wake = asyncio.Event()
        self.ignored: dict[str, None] = {}
        """The addresses that relays have reported and that are not the upstream's, at most MAX_IGNORED."""

    def knows(self, name: str) -> bool:
        """Returns True if the upstream has an engine at this address (host:port)."""
        return name in self._names or name in self._resolved

    def names(self) -> list[str]:
        """Returns the addresses (host:port) of the upstream's engines, as far as they are known."""
        return sorted(self._names | self._resolved.keys())

    def known(self, report: Iterable[EngineHealth]) -> Iterator[EngineHealth]:
        """Yields the entries of a relay's report that are of the upstream's engines; the others are remembered."""
        for entry in islice(report, MAX_ENGINES):
            if self.knows(entry.engine):
                yield entry
            elif self._lookup is None:
                self._ignore(entry.engine)
            elif entry.engine not in self.ignored and len(self._asked_for) < MAX_IGNORED:
                # The relay may have asked the name server later than this process: the next look-up tells.
                self._asked_for.add(entry.engine)
                self._wake.set()

    def _ignore(self, name: str) -> None:
        if name in self.ignored or len(self.ignored) >= MAX_IGNORED:
            return
        self.ignored[name] = None
        upstream = "the upstream" if self._lookup is None else f"an address of {self._lookup.origin.host} here"
        log.warning(
            "a relay reports the engine %s, which is not %s: what relays say of it is ignored, and it is not contacted",
            shown_address(name),
            upstream,
        )

    async def run(self) -> None:
        """Looks the name up again and again, until cancelled."""
        if self._lookup is None:
            await asyncio.Event().wait()
        while True:
            await self.resolve()
            await asyncio.sleep(SOON_SECONDS)
            try:
                async with asyncio.timeout(RESOLVE_SECONDS - SOON_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def resolve(self) -> None:
        """Looks the name up once. A look-up that fails changes nothing."""
        if self._lookup is None:
            return
        asked_for, self._asked_for = self._asked_for, set()
        self._wake.clear()
        if (origins := await self._lookup.addresses()) is None:
            return
        now = self._clock()
        self._resolved |= {origin.name: now for origin in origins[:MAX_ENGINES]}
        self._resolved = {name: at for name, at in self._resolved.items() if now - at <= KEEP_SECONDS}
        for name in self._resolved.keys() & self.ignored.keys():
            del self.ignored[name]
        for name in sorted(asked_for - self._resolved.keys()):
            self._ignore(name)
