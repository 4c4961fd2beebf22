"""The secrets under which requests that make the engine's plugin act are signed (`hemostat_calibration.engine_keys`).

Relays sign with the current one, which they get with the policy. Engines are told the next one, too, long before it is
used, and go on believing a former one for a while (`hemostat_engine.secrets`): a rotation loses no request. A control
process that starts has new ones.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import Any

from hemostat_calibration.engine_keys import SECRET_CHARACTERS, signed

ROTATE_SECONDS = 3600.0


def _new() -> str:
    return secrets.token_hex(SECRET_CHARACTERS // 2)


class RequestSecrets:
    """Owns the secrets. Pure except for the time, which is passed in (monotonic seconds), and `make`, which makes them.

    They are in no log, in no file and in no answer but those to engines and relays.
    """

    def __init__(self, make: Callable[[], str] = _new) -> None:
        self._make = make
        self._current, self._next = make(), make()
        self._rotates_at: float | None = None

    def current(self, now: float) -> str:
        """Returns the secret that requests are signed with from now on."""
        if self._rotates_at is None:
            self._rotates_at = now + ROTATE_SECONDS
        elif now >= self._rotates_at:
            self._current, self._next = self._next, self._make()
            self._rotates_at = now + ROTATE_SECONDS
        return self._current

    def for_engines(self, now: float) -> list[str]:
        """Returns the secrets that engines have to know."""
        return [self.current(now), self._next]

    def signed(self, xargs: Mapping[str, Any], now: float) -> dict[str, Any]:
        """Returns the `vllm_xargs` of a request of the control process's own."""
        return signed(xargs, self.current(now), secrets.token_hex(8))
