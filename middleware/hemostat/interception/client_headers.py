"""The X-Hemostat headers with which a client asks for, or opts out of, sampling and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hemostat.hooks import Headers, Refusal
from hemostat.ipc.messages import Policy
from hemostat.metrics.reasons import Unscored
from hemostat.openai.errors import error_body
from hemostat_calibration.profiles.profile import VERSION_PATTERN

_PREFIX = b"x-hemostat-"
_SHADOW = b"x-hemostat-shadow"
_CALIBRATION = b"x-hemostat-calibration"
_LABEL = b"x-hemostat-label"


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """The options that a client's X-Hemostat headers ask for."""

    shadow: bool | None = None
    """The value of X-Hemostat-Shadow: True for `on`, False for `off`, None without the header."""
    calibration: str | None = None
    """The value of X-Hemostat-Calibration: a profile's version, or `off`; None without the header."""
    label: str = ""
    """The value of X-Hemostat-Label, if labels are configured; "" without the header."""


def hemostat_headers(headers: Headers) -> list[tuple[bytes, bytes]]:
    """Returns the fields whose name begins with X-Hemostat-, with lower-case names."""
    return [(name.lower(), value) for name, value in headers if name[: len(_PREFIX)].lower() == _PREFIX]


def first_value(fields: Sequence[tuple[bytes, bytes]], name: bytes) -> bytes:
    """Returns the value of the first field with this lower-case name, which is the one that servers read; b"" without
    one. fields: with lower-case names."""
    for field, value in fields:
        if field == name:
            return value
    return b""


def read_options(fields: Sequence[tuple[bytes, bytes]], policy: Policy) -> ClientOptions | Refusal:
    """Returns the options in the fields of `hemostat_headers`; a Refusal where one has an invalid value."""
    shadow: bool | None = None
    calibration: str | None = None
    label = ""
    for name, raw in fields:
        value = raw.decode("latin-1").strip()
        if name == _SHADOW:
            if value not in ("on", "off"):
                return _refuse("X-Hemostat-Shadow", "must be `on` or `off`.")
            shadow = value == "on"
        elif name == _CALIBRATION:
            if value != "off" and not VERSION_PATTERN.fullmatch(value):
                return _refuse("X-Hemostat-Calibration", "must be `off` or a profile version (32 hexadecimal digits).")
            calibration = value
        elif name == _LABEL and policy.labels:
            if value not in policy.labels:
                return _refuse("X-Hemostat-Label", f"must be one of: {', '.join(sorted(policy.labels))}.")
            label = value
    return ClientOptions(shadow, calibration, label)


def skipped_by_headers(options: ClientOptions, policy: Policy) -> Unscored | None:
    """Returns why the request is not to be sampled by its headers, whatever is drawn; None if it may be sampled."""
    if options.shadow is False:
        return Unscored.OPTED_OUT
    return Unscored.ON_NOT_ALLOWED if options.shadow and not policy.shadow_allow_on else None


def _refuse(header: str, problem: str) -> Refusal:
    return Refusal(400, error_body(f"The header {header} {problem}", header))
