"""The types of the configuration's values, with their checks, and the base of its sections."""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
)

from hemostat.config.text import short_repr

_HOST = re.compile(r"[A-Za-z0-9_.:%-]{1,255}")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?|xpu(:\d+)?|mps")
_HEADER = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SECRET = re.compile(r"[!-~]{1,4096}")
_ALL_IPV4 = ipaddress.IPv6Network("::ffff:0:0/96")


def server_url(value: str) -> str:
    """Returns the address without a slash at its end. Raises ValueError, whose text shows no credentials."""
    if "@" in value:  # wherever it is: what is before it may be a password
        raise ValueError("must not hold a user or a password; use api_key")
    try:
        parts = urlsplit(value)
        invalid = parts.scheme not in {"http", "https"} or not _HOST.fullmatch(parts.hostname or "") or parts.port == 0
    except ValueError:  # its text has a part of the value
        invalid = True
    if invalid:
        raise ValueError(f"{short_repr(value)} is not an http address; write it like http://127.0.0.1:8000")
    if parts.path not in {"", "/"} or parts.query or parts.fragment:
        root = f"{parts.scheme}://{parts.netloc}"
        raise ValueError(f"{short_repr(value)} has a path; give the server's root, {root}")
    return value.rstrip("/")


def base_url(value: str) -> str:
    """Returns the address of a server with the OpenAI API, without /v1 at its end; it may have a path, as vendors'
    addresses do. Raises ValueError."""
    scheme, separator, rest = value.partition("://")
    host, slash, path = rest.partition("/")
    path = f"{slash}{path}".rstrip("/").removesuffix("/v1")
    if "?" in path or "#" in path or "@" in path:
        return server_url(value)
    return server_url(f"{scheme}{separator}{host}") + path


def candidate_url(value: str) -> str:
    """Returns `URL[#NAME]` without a slash at the end of the URL. Raises ValueError."""
    # A password, which is refused, may have a #.
    url, _, name = (value, "", "") if "@" in value else value.partition("#")
    return server_url(url) + (f"#{name}" if name else "")


def _engines_url(value: str) -> str:
    scheme = "dns+" if value.startswith("dns+") else ""
    return scheme + server_url(value.removeprefix(scheme))


def _host(value: str) -> str:
    if not _HOST.fullmatch(value):
        raise ValueError(f"{short_repr(value)} is not a host name or address")
    return value


def split_address(value: str) -> tuple[str, int]:
    """Returns the host and the port of `host:port`, where an IPv6 host is in brackets. Raises ValueError."""
    host, _, port = value.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if (
        not _HOST.fullmatch(bare)
        or not re.fullmatch(r"[0-9]{1,5}", port)
        or int(port) > 65535
        or (":" in bare) != (bare != host)
    ):
        raise ValueError(f"{short_repr(value)} is not a host and a port; write it like control:8082 or [::1]:8082")
    return bare, int(port)


def _host_port(value: str) -> str:
    split_address(value)
    return value


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _network(value: str) -> str:
    try:
        network = ipaddress.ip_network(value)
    except ValueError:
        raise ValueError(f"{short_repr(value)} is not a network; write it like 10.0.0.0/8 or 2001:db8::/32") from None
    if not network.prefixlen or (isinstance(network, ipaddress.IPv6Network) and network.supernet_of(_ALL_IPV4)):
        raise ValueError(f"{value} is everybody; name the networks of your gateways, such as 10.0.0.0/8")
    return str(network)


def header_name(value: str) -> str:
    if not _HEADER.fullmatch(value):
        raise ValueError(f"{short_repr(value)} is not the name of a header")
    return value.lower()


def is_secret(text: str) -> bool:
    """Returns True if a header can carry the text: printable ASCII without spaces."""
    return _SECRET.fullmatch(text) is not None


def _secret(value: SecretStr) -> SecretStr:
    if not is_secret(value.get_secret_value()):
        raise ValueError("must be printable ASCII without spaces, as it travels in a header")
    return value


def _existing_file(value: Path) -> Path:
    if not os.path.isfile(value):  # Path.is_file raises on names that are too long
        raise ValueError(f"there is no file {short_repr(str(value))}")
    return value


def _existing_folder(value: Path) -> Path:
    if not os.path.isdir(value):
        raise ValueError(f"there is no folder {short_repr(str(value))}")
    return value


def _device(value: str) -> str:
    if not _DEVICE.fullmatch(value):
        raise ValueError(f"{short_repr(value)} is not a device; use auto, cpu, cuda, cuda:0 or mps")
    return value


def text_is_model(value: object) -> object:
    return {"model": value} if isinstance(value, str) else value


def _null_is_none(value: object) -> object:
    return "none" if value is None else value


def yaml_off(value: object) -> object:
    """Returns the value, with `off` in place of false, since YAML 1.1 reads an unquoted `off` as false."""
    return "off" if value is False else value


EnginesUrl = Annotated[str, AfterValidator(_engines_url)]
ServerUrl = Annotated[str, AfterValidator(server_url)]
CandidateUrl = Annotated[str, AfterValidator(candidate_url)]
Host = Annotated[str, AfterValidator(_host)]
Network = Annotated[str, AfterValidator(_network)]
HostPort = Annotated[str, AfterValidator(_host_port)]
Secret = Annotated[SecretStr, AfterValidator(_secret)]
ExistingFile = Annotated[Path, AfterValidator(_existing_file)]
ExistingFolder = Annotated[Path, AfterValidator(_existing_folder)]
Device = Annotated[str, AfterValidator(_device)]
"""A torch device, or auto."""
ModelName = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Port = Annotated[int, Field(ge=0, le=65535)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Backend = Annotated[Literal["transformers", "vllm", "none"], BeforeValidator(_null_is_none)]
Mode = Annotated[Literal["off", "observe", "auto"], BeforeValidator(yaml_off)]


class Section(BaseModel):
    """A mapping that has only known keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _reject_booleans(cls, value: object, info: ValidationInfo) -> object:
        """Returns the value, and rejects booleans for numbers, since pydantic would read `rate: yes` as 1.0."""
        if isinstance(value, bool) and info.field_name is not None:
            kind = without_optional(cls.model_fields[info.field_name].annotation)
            if kind in {int, float}:
                raise ValueError("a number is expected, not an unquoted yes, no, on or off")
            if get_origin(kind) is Literal and not (value is False and "off" in get_args(kind)):
                shown = "on/yes/true" if value else "off/no/false"
                raise ValueError(f"an unquoted {shown} is not one of {', '.join(get_args(kind))}")
        return value


def without_optional(annotation: object) -> object:
    """Returns the type inside Optional and Annotated."""
    if get_origin(annotation) is Annotated:
        return without_optional(get_args(annotation)[0])
    arguments = get_args(annotation)
    if type(None) in arguments:
        return without_optional(next(a for a in arguments if a is not type(None)))
    return annotation
