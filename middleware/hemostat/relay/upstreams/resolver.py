"""The engines behind one name: each of its addresses is one (a headless Service of Kubernetes, for example)."""

from __future__ import annotations

import asyncio
import logging

from hemostat.ipc.origin import DNS, Lookup, parse_origin
from hemostat.relay.upstreams.group import Upstreams

log = logging.getLogger("hemostat.relay")


class Resolver:
    """Sets the engines of `upstreams` to the addresses of the name in `url`, and again whenever they have changed.

    Raises ValueError if `url` is not `dns+http(s)://name:port`. seconds: pause between two look-ups.

    A look-up that fails changes nothing: the engines of the last one go on.
    """

    def __init__(self, upstreams: Upstreams, url: str, seconds: float) -> None:
        self._upstreams = upstreams
        self._lookup = Lookup(parse_origin(url.removeprefix(DNS)), log)
        self._seconds = seconds

    async def run(self) -> None:
        """Resolves the name again and again until it is cancelled."""
        while True:
            await self.resolve()
            await asyncio.sleep(self._seconds)

    async def resolve(self) -> None:
        """Looks the name up once."""
        origins = await self._lookup.addresses()
        if origins is not None and origins != [engine.origin for engine in self._upstreams.engines]:
            log.info("%s: engines are %s", self._lookup.origin.host, ", ".join(origin.name for origin in origins))
            self._upstreams.set_origins(origins)
