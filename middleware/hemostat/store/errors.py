"""Counts the operations of the store that have failed, and logs them."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat.store.protocol import StoreFailure

log = logging.getLogger("hemostat.store")


class StoreErrorLog:
    """Counts every failed operation, and logs each change: another message, and that the store answers again."""

    def __init__(self) -> None:
        self.last_message = ""
        """The message of the last failure since the store has answered; "" if there was none."""
        self.count = 0

    def record(self, failure: StoreFailure) -> None:
        self.count += 1
        message = str(failure)
        if message != self.last_message:
            log.error("%s", message)
        self.last_message = message

    def clear(self) -> None:
        """Clears the last message, since the store has answered."""
        if self.last_message:
            log.info("the store answers again")
        self.last_message = ""

    def samples(self) -> Iterator[Sample]:
        yield Sample(names.STORE_ERRORS, (), self.count)
