"""A relay's settings of the engines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class UpstreamSettings:
    """The settings of `config.models.Upstream`, and constants. Times are in seconds."""

    urls: tuple[str, ...]
    """The URLs of the engines; or one with the prefix DNS."""
    api_key: str | None = None
    """The key that is sent as a bearer token if the client sends no Authorization of its own."""
    ca: Path | None = None
    """The PEM file of the authority that signed the engines' certificates, for https."""
    max_connections: int = 512
    """The largest number of connections to each engine; requests beyond it wait in order of arrival."""
    queue_seconds: float = 60.0
    """The longest time that a request waits for a connection, before it is answered with 503: as long as most clients
    wait.
    """
    health_seconds: float = 2.0
    """The pause between two requests for each engine's /health, which costs it next to nothing; 0: none are sent."""
    resolve_seconds: float = 5.0
    """The pause between two look-ups of a name (dns+http)."""
    affinity: bool = True

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> UpstreamSettings:
        """Returns the settings from their JSON. Raises TypeError on a key that is not a field."""
        ca = given.get("ca")
        return cls(**{**given, "urls": tuple(given["urls"]), "ca": Path(ca) if ca else None})
