"""One notification for everything that the relays' policy may depend on."""

from __future__ import annotations

from collections.abc import Callable


class Changes:
    """Code that changes state on which the policy may depend calls `notify`; each subscriber then reads the current
    state."""

    def __init__(self) -> None:
        self._subscribers: list[Callable[[], None]] = []

    def subscribe(self, subscriber: Callable[[], None]) -> None:
        self._subscribers.append(subscriber)

    def notify(self) -> None:
        for subscriber in self._subscribers:
            subscriber()
