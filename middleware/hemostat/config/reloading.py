"""Rules for what a changed setting needs in order to take effect in a running instance (SIGHUP).

Relays are replaced at every reload, so whatever a relay reads at its start takes effect. A setting that is not named
here has the control process replaced, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

from hemostat.config.schema import LEAVES, Settings

NEEDS_RESTART = frozenset({"listen.host", "listen.port", "admin.host", "admin.port", "control.listen", "run_dir"})
"""The listening sockets and the folder of a running instance: changed by a restart, or by an upgrade (SIGUSR2)."""
RELAYS_ONLY = frozenset(
    {key for key in LEAVES if key.startswith(("limits.", "client_limits."))}
    | {"log.requests", "log.access", "log.access_clients", "upstream.max_connections"}
    | {"workers", "shutdown_seconds", "control.addresses", "control.ca"}
)
"""The settings that mean nothing to the control process."""
IN_PLACE = frozenset(
    {"shadow.rate", "shadow.allow_on", "log.level", "log.format"}
    | {"admin.token", "admin.token_file", "admin.engine_token", "admin.engine_token_file"}
    | {"control.token", "control.token_file", "control.cert", "control.key"}
)
"""The control process applies these while it runs: see `control.process.follow`."""


@dataclass(frozen=True, slots=True)
class Reload:
    """The result of comparing the file's settings with those in force.

    settings: the settings that are to be in force; a setting that needs a restart keeps its former value.
    """

    settings: Settings
    changed: list[str]
    """The dotted keys of all changed settings, with the ones that need a restart."""
    needs_restart: list[str]
    replaces_control: bool


def plan_reload(old: Settings, new: Settings) -> Reload:
    changed = [key for key in LEAVES if _value(old, key) != _value(new, key)]
    needs_restart = [key for key in changed if key in NEEDS_RESTART]
    settings = new
    for key in needs_restart:
        settings = _with(settings, key, _value(old, key))
    replaces_control = bool(set(changed) - NEEDS_RESTART - RELAYS_ONLY - IN_PLACE)
    return Reload(settings, changed, needs_restart, replaces_control)


def _value(settings: Settings, key: str) -> Any:
    return reduce(getattr, key.split("."), settings)


def _with(settings: Settings, key: str, value: Any) -> Settings:
    section, _, name = key.rpartition(".")
    if not section:
        return settings.model_copy(update={name: value})
    return settings.model_copy(update={section: getattr(settings, section).model_copy(update={name: value})})
