"""The sections `log` and `tracing` of the configuration."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from hemostat.config.fields import Section, ServerUrl, yaml_off
from hemostat.config.text import short_repr

EXPORTER = "opentelemetry-exporter-otlp-proto-http"
"""The distribution that sends traces; it brings the rest of `hemostat[tracing]`."""


class Log(Section):
    """The log, on standard error, and the access log."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe lines that are written."""
    format: Literal["text", "json"] = "text"
    """json: one object for each line."""
    requests: bool = False
    """One additional line for each generation: ids and outcomes, never prompts or answers."""
    access: Annotated[str, BeforeValidator(yaml_off)] = "off"
    """The access log: off, stdout or a path. One line for each request on the data port, refused ones included, in the
    form of `format`."""
    access_clients: bool = False
    """The access log has the clients' addresses."""

    @field_validator("access")
    @classmethod
    def _off_or_path(cls, value: str) -> str:
        if value not in {"off", "stdout"} and not value.startswith("/"):
            raise ValueError(f"{short_repr(value)} is none of off, stdout and a path like /var/log/hemostat/access.log")
        return value

    @field_validator("level", mode="before")
    @classmethod
    def _any_case(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value


class Tracing(Section):
    """OpenTelemetry; needs the extra `hemostat[tracing]`."""

    endpoint: ServerUrl | None = None
    """An OTLP/HTTP receiver, like `http://collector:4318`. none: no traces."""
    ratio: float = Field(default=0.05, ge=0, le=1)
    """Fraction of the traces started by Hemostat that is sampled; a client's own decision is kept."""

    @field_validator("endpoint")
    @classmethod
    def _installed(cls, value: str | None) -> str | None:
        # Another package may have installed its API alone.
        if value is not None and not any(importlib.metadata.distributions(name=EXPORTER)):
            raise ValueError("needs OpenTelemetry: pip install 'hemostat[tracing]'")
        return value
