"""The admin ports that the engine talks to: of the control process at all its addresses, or of several middlewares."""

from __future__ import annotations

import socket

from hemostat_engine.admin_client import AdminClient, ReportResponse
from hemostat_engine.settings import DNS_PREFIX, Settings, split_admin_url

RESOLVE_SECONDS = 5.0
"""The time between two look-ups of host names."""
MAX_PEERS = 32


class Peer:
    """One admin port and its last response to a report."""

    def __init__(self, url: str, token: str | None) -> None:
        self.url = url
        self.client = AdminClient(url, token)
        self.last_response: ReportResponse | None = None
        self.answers = True
        """It is True if the peer answered the last report. The versions that it asked for before that are kept: it may
        be back soon.
        """
        self.next_report = 0.0
        """The time of the next report, in monotonic seconds."""

    def wants(self, version: str) -> bool:
        return self.last_response is not None and version in self.last_response.hold

    def owns(self, nonce: str) -> bool:
        """Returns True if the tapped request came through this middleware."""
        prefix = self.last_response.nonce_prefix if self.last_response is not None else ""
        return bool(prefix) and nonce.startswith(f"{prefix}-")


class Peers:
    """All admin ports that the setting names. `refresh` resolves host names again."""

    def __init__(self, settings: Settings) -> None:
        self._urls = settings.admin_url.split(",") if settings.admin_url else []
        self._token = settings.engine_token
        self._next_refresh = 0.0
        self._resolved: dict[str, list[str]] = {}
        self.all: list[Peer] = []

    def __bool__(self) -> bool:
        """Returns True if an admin port is configured."""
        return bool(self._urls)

    def is_due(self, now: float) -> bool:
        """Returns True if `refresh` would resolve host names."""
        return now >= self._next_refresh

    def refresh(self, now: float) -> None:
        """Resolves the host names if RESOLVE_SECONDS have passed; a peer whose address remains keeps its state."""
        if not self.is_due(now):
            return
        self._next_refresh = now + RESOLVE_SECONDS
        urls = dict.fromkeys(address for url in self._urls for address in self._addresses(url))
        known = {peer.url: peer for peer in self.all}
        self.all = [known.get(url) or Peer(url, self._token) for url in list(urls)[:MAX_PEERS]]

    def _addresses(self, url: str) -> list[str]:
        """Returns the addresses of one setting; the last known ones if its name cannot be resolved."""
        if not url.startswith(DNS_PREFIX):
            return [url]
        parts = split_admin_url(url)
        try:
            result = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
        except OSError:
            return self._resolved.get(url, [])
        hosts = sorted({str(address[0]) for *_, address in result})
        self._resolved[url] = [f"http://{f'[{h}]' if ':' in h else h}:{parts.port or 80}" for h in hosts]
        return self._resolved[url]

    def versions_to_hold(self) -> tuple[str, ...]:
        """Returns the versions that any of the ports asks for; the versions of ports that answer come first."""
        peers = sorted(self.all, key=lambda peer: not peer.answers)
        return tuple(version for peer in peers if peer.last_response is not None for version in peer.last_response.hold)

    def owns(self, peer: Peer, nonce: str) -> bool:
        """Returns True if the tapped request came through `peer`. A single peer owns every request."""
        return len(self.all) == 1 or peer.owns(nonce)

    def label(self, operation: str, peer: Peer) -> str:
        """Returns the operation's name in logs and for retries; with several ports it has the address."""
        return operation if len(self.all) == 1 else f"{operation} to {peer.url}"
