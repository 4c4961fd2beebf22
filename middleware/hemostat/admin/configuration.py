"""The configuration that is in force, as the supervisor reports it."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from hemostat.metrics import names
from hemostat.metrics.samples import Sample


class ConfigurationReport(msgspec.Struct, frozen=True):
    """The supervisor's report about the configuration.

    loaded_at: the Unix time from which the present settings are in force. error: the reason why the last SIGHUP changed
    nothing, or "". needs_restart: settings of the file that take effect after a restart only.
    """

    loaded_at: float
    error: str = ""
    needs_restart: list[str] = []


class Configuration:
    """Owns the last report. loaded_at: see `ConfigurationReport`."""

    def __init__(self, loaded_at: float) -> None:
        self.report = ConfigurationReport(loaded_at)

    def samples(self) -> Iterator[Sample]:
        yield Sample(names.CONFIG_LAST_RELOAD_SUCCESSFUL, (), float(not self.report.error))
