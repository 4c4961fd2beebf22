"""The control process's secrets, as this process knows them: which requests the plugin acts on.

A secret is believed for KEEP_SECONDS after the control process last named it. So requests that are under way when it is
rotated, or signed by a relay with the policy before, are still acted on; and after the control process has been out of
reach for that long, none are. A process that knows no secret acts on nothing. Secrets are never logged.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hemostat_calibration.engine_keys import is_signed

KEEP_SECONDS = 120.0
"""The time for which secrets are kept: relays forget their policy, and with it the secret, 30 s after the last word of
the control process."""
MAX_SECRETS = 128
"""The secrets of all admin ports that are kept; the ones that were named longest ago are forgotten first."""


class Secrets:
    """Owns the secrets. Thread-safe: threads note what admin ports answer, the engine's thread asks.

    clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._named_at: dict[str, float] = {}
        self._lock = threading.Lock()

    def update(self, secrets: Iterable[str]) -> None:
        """Notes the secrets that an admin port has just named."""
        now = self._clock()
        with self._lock:
            for secret in secrets:
                self._named_at.pop(secret, None)
                self._named_at[secret] = now
            while len(self._named_at) > MAX_SECRETS:
                del self._named_at[next(iter(self._named_at))]

    def believed(self) -> list[str]:
        """Returns the secrets that are believed now."""
        now = self._clock()
        with self._lock:
            return [secret for secret, at in self._named_at.items() if now - at <= KEEP_SECONDS]

    def signed(self, xargs: Mapping[str, Any]) -> bool:
        """Returns True if the acting keys of a request are the control process's."""
        return is_signed(xargs, self.believed())
