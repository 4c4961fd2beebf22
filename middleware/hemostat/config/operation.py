"""The sections of the configuration that concern the processes themselves: ports, other machines, limits, the log."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from hemostat.config.fields import (
    ExistingFile,
    Host,
    HostPort,
    Network,
    Port,
    Secret,
    Section,
    ServerUrl,
    is_loopback,
    split_address,
    yaml_off,
)
from hemostat.config.packages import install_command, missing
from hemostat.config.text import short_repr

EXPORTER = "opentelemetry-exporter-otlp-proto-http"
"""The distribution that sends traces. It brings everything else of the extra `tracing`."""
_WINDOW = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")
_CAPTURES = "on another machine than this one, captures travel with clients' tokens"


class Listen(Section):
    """The data port, which clients use."""

    host: Host = "0.0.0.0"  # noqa: S104  the proxy is what clients talk to
    """The address that the data port listens on."""
    port: Port = 8080
    """The TCP port. 0 takes any free one."""


class Admin(Section):
    """The admin port: metrics, health, console, JSON."""

    host: Host = "127.0.0.1"
    """The address that the admin port listens on. An address other than loopback requires `token`."""
    port: Port = 8081
    """The TCP port. 0 takes any free one."""
    token: Secret | None = None
    """The admin token. Every request that changes state has to send it. If it is none, such requests are refused."""
    token_file: ExistingFile | None = None
    """A file that contains the token and nothing else, in place of `token`. It is read at the start and at SIGHUP."""
    engine_token: Secret | None = None
    """The token of the plugin in vLLM. The plugin can report and fetch profiles with it, and do nothing else. If it is
    none, the plugin needs `token`."""
    engine_token_file: ExistingFile | None = None
    """A file that contains the engine token and nothing else, in place of `engine_token`. It is read at the start and
    at SIGHUP."""
    metrics_need_token: bool = False
    """If it is true, `/metrics` requires the admin token, too."""
    allowed_hosts: list[Host] = Field(default=[], max_length=64)
    """The host names under which the port may be requested, in addition to IP addresses and localhost. If the list is
    empty, no other name is accepted on loopback (against DNS rebinding), and any name elsewhere."""

    @property
    def names(self) -> list[str] | None:
        """The accepted host names. None means all."""
        return self.allowed_hosts if self.allowed_hosts or is_loopback(self.host) else None


class ControlSettings(Section):
    """The way in which relays and control processes on different machines find and trust each other."""

    addresses: list[HostPort] = Field(default=[], max_length=16)
    """The addresses `host:port` of all control processes, for `hemostat relay`. A name stands for all of its
    addresses."""
    listen: HostPort | None = None
    """The address `host:port` that relays on other machines connect to. `hemostat serve` listens there, too, if it is
    set. `hemostat control` without it measures with the plugin in vLLM alone."""
    token: Secret | None = None
    """The relay token, which is the same on both sides. Whoever has it gets the policy, and Hemostat accepts its
    reports of what clients got."""
    token_file: ExistingFile | None = None
    """A file that contains the token and nothing else, in place of `token`. It is read at the start and at SIGHUP."""
    ca: ExistingFile | None = None
    """A PEM file of the authority that signs the control processes' certificates, for relays. With none there is no
    TLS, and only loopback addresses are allowed."""
    cert: ExistingFile | None = None
    """A PEM file of the certificate of a control process, which names the host of `addresses`. With none there is no
    TLS, and only loopback addresses are allowed. It is read at the start and at SIGHUP."""
    key: ExistingFile | None = None
    """A PEM file of the certificate's key. It is read at the start and at SIGHUP."""

    @model_validator(mode="after")
    def _secured(self) -> ControlSettings:
        if (self.cert is None) != (self.key is None):
            raise ValueError("cert and key: set both, or none of them")
        if (self.addresses or self.listen) and self.token is None:
            raise ValueError("token: required with addresses or listen; the same text on both sides, or a token_file")
        far = next((address for address in self.addresses if not is_loopback(split_address(address)[0])), None)
        if far is not None and self.ca is None:
            raise ValueError(f"ca: required, as {far} is not loopback, and {_CAPTURES}; set the authority's PEM file")
        if self.listen is not None and not is_loopback(split_address(self.listen)[0]) and self.cert is None:
            raise ValueError(f"cert: required, as {self.listen} is not loopback, and {_CAPTURES}; set cert and key")
        return self


class Limits(Section):
    """The limits of what clients may send, and of how much of a relay process they may use."""

    buffered_bytes: int = Field(default=128 * 1024 * 1024, ge=1024 * 1024)
    """The memory of one relay process for heads and bodies, for requests that wait for a connection, and (up to a
    quarter of it) for copies that may have to be sent again. Beyond it, requests of the client that holds most are
    answered with 503."""
    connections_per_client: int = Field(default=8_192, ge=1, le=16_384)
    """The largest number of connections from one address (IPv6: one /64 network). Behind a load balancer all clients
    have its address: set it to 16384 there, which is what a relay process accepts of all clients."""


class ClientLimits(Section):
    """Limits for each client of each relay process. Beyond them, requests get 429 with `Retry-After`. There are no
    limits by default. Requests other than GET and HEAD count."""

    key: Literal["authorization", "address"] = "authorization"
    """The attribute that names a client. With authorization it is the credential in the Authorization header, and the
    address of a client that sends none. With address it is the IP address (IPv6: the /64 network)."""
    requests_per_second: float | None = Field(default=None, gt=0, le=1_000_000)
    """The sustained rate of requests. none means no limit."""
    burst: int = Field(default=10, ge=1, le=1_000_000)
    """The number of requests that may come at once, before `requests_per_second` applies."""
    concurrent: int | None = Field(default=None, ge=1, le=1_000_000)
    """The largest number of requests in progress. none means no limit."""
    trusted_proxies: list[Network] | None = Field(default=None, max_length=64)
    """The networks of the gateways in front, such as `[10.0.0.0/8]`. If it is set, a client's address is the last one
    of X-Forwarded-For that none of them has, for limits, sharing and the access log, and the request goes on with this
    address alone as X-Forwarded-For. With an empty list it is the address of the connection. With none, the field is
    passed on and not read."""


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


class SpoolSettings(Section):
    """Sampled requests on disk, before they are scored, for `hemostat score`. It needs the extra `spool`."""

    path: str | None = Field(default=None, min_length=1)
    """The folder that sampled requests are written to, also in an object store (`s3://bucket/spool`):
    docs/offline.md. **Token ids are text**, so none are written by
    default. With `reference.backend: none` requests are sampled and written, and scored later by `hemostat score`."""
    key: str | None = Field(default=None, min_length=1)
    """The key that encrypts the folder: the path of a file, or `env:NAME` with the name of an environment variable.
    Both hold 64 hexadecimal digits (`openssl rand -hex 32`). With plain, nothing is encrypted. It is required with
    `path`."""
    max_bytes: int = Field(default=20 * 1024**3, ge=64 * 1024**2)
    """The limit of the folder's size. Above half of it, a request is admitted with a probability that falls to 0 at the
    limit, so that what is kept stays a sample of all of the time."""
    keep_hours: float = Field(default=24.0 * 14, gt=0.0, le=24.0 * 366)
    """The time after which a file of the folder is removed, whether it was scored or not."""
    score: str = Field(default="now", pattern=f"^(now|never|{_WINDOW.pattern})$")
    """The time at which the reference scores what is written. With now, requests are also scored at once, if there is a
    reference. With a window such as 02:00-05:00 (UTC), the reference scores them in these hours of each day, in the
    order of time. With never, only `hemostat score` does. Nothing is treated by evidence that is older than 10 minutes:
    a window and never require `calibration.mode: off`."""

    @property
    def window(self) -> tuple[int, int] | None:
        """The minutes of the day, UTC, at which the window begins and ends; None if `score` is no window."""
        match = _WINDOW.fullmatch(self.score)
        if match is None:
            return None
        began, ended = (int(match[part]) * 60 + int(match[part + 1]) for part in (1, 3))
        return began, ended

    @field_validator("score", mode="before")
    @classmethod
    def _time_of_scoring(cls, value: object) -> object:
        match = _WINDOW.fullmatch(str(value))
        if value not in ("now", "never") and (match is None or match[0][:5] == match[0][6:]):
            raise ValueError("use now, never, or two times of the day (UTC) like 02:00-05:00")
        return value

    @field_validator("path", mode="before")
    @classmethod
    def _without_password(cls, value: object) -> object:
        text = str(value) if isinstance(value, Path) else value
        if isinstance(text, str) and "://" in text and "@" in text:
            raise ValueError("an address has no password; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead")
        return text

    @model_validator(mode="after")
    def _keyed(self) -> SpoolSettings:
        if self.path is not None and self.key is None:
            raise ValueError("key: required with path, as token ids are text; name a key file, or plain")
        if self.path is None and self.score != "now":
            raise ValueError(f"path: required with score: {self.score}; name the folder")
        if self.path is not None and "://" in self.path and self.window is not None:
            raise ValueError(f"score: {self.score} requires a path on this machine; use now or never, or change path")
        if self.path is not None and (text := missing("spool")):
            raise ValueError(f"path: {text}")
        return self


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
