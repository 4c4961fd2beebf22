"""The roles of a supervisor: which of Hemostat's processes it runs."""

from __future__ import annotations

from enum import Enum


class Role(Enum):
    """The role of a supervisor. The value is the name of the command."""

    SERVE = "serve"
    """It runs relays and the control process on one machine."""
    RELAY = "relay"
    """It runs relays, whose control process is on another machine."""
    CONTROL = "control"
    """A control process, whose relays are on other machines."""

    @property
    def relays(self) -> bool:
        return self is not Role.CONTROL

    @property
    def control(self) -> bool:
        return self is not Role.RELAY
