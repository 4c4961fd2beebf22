"""The sections `log` and `tracing` of the configuration."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from hemostat.config.fields import Section, ServerUrl, yaml_off
from hemostat.config.install_command import install_command
from hemostat.config.text import short_repr

EXPORTER = "opentelemetry-exporter-otlp-proto-http"
"""The distribution that sends traces. It brings everything else of the extra `tracing`."""


class Log(Section):
    """The log, on standard error, and the access log."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe lines that are written."""
    format: Literal["text", "json"] = "text"
    """The format of the lines. With json each line is one object."""
    requests: bool = False
    """If it is true, one more line is written for each generation: ids and outcomes, never prompts or answers."""
    access: Annotated[str, BeforeValidator(yaml_off)] = "off"
    """The access log: off, stdout or a path. It has one line for each request on the data port, refused ones included,
    in the format that `format` names."""
    access_clients: bool = False
    """If it is true, the access log has the clients' addresses."""

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
    """OpenTelemetry. It needs the extra `tracing`."""

    endpoint: ServerUrl | None = None
    """An OTLP/HTTP receiver, like `http://collector:4318`. With none there are no traces."""
    ratio: float = Field(default=0.05, ge=0, le=1)
    """The fraction of the traces started by Hemostat that is sampled. A client's own decision is kept."""

    @field_validator("endpoint")
    @classmethod
    def _installed(cls, value: str | None) -> str | None:
        # Another package may have installed its API alone.
        if value is not None and not any(importlib.metadata.distributions(name=EXPORTER)):
            raise ValueError(f"needs OpenTelemetry: {install_command('tracing')}")
        return value
