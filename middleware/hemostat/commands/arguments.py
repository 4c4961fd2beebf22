"""Parts that several commands share: argument types, the settings' flags, the address of a vLLM server, and errors."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from hemostat_calibration.errors import HemostatError

if TYPE_CHECKING:
    from hemostat.config.schema import Settings
    from hemostat.reference.server import VllmServer


EXIT_INTERRUPTED = 130

SHORTHANDS = {
    "upstream": ("upstream.url", "URL", "Address of the vLLM server with the compressed model"),
    "host": ("listen.host", "HOST", "Address that the data port listens on"),
    "port": ("listen.port", "PORT", "TCP port of the data port"),
    "admin-port": ("admin.port", "PORT", "TCP port of the admin port"),
    "rate": ("shadow.rate", "FRACTION", "Fraction of the requests that is measured"),
    "mode": ("calibration.mode", "MODE", "Mode of the calibration: off, observe or auto"),
    "workers": ("workers", "N", "Number of relay processes"),
    "log-level": ("log.level", "LEVEL", "Level of the log: debug, info, warning or error"),
}
"""The short flags: flag -> dotted key, placeholder, help."""


_KEY = re.compile(r"[\w.-]+")


class UsageError(HemostatError):
    """The command line is invalid, or cannot be carried out; the text is one line."""


class Parser(argparse.ArgumentParser):
    """Raises UsageError if argparse would print the usage and exit."""

    def error(self, message: str) -> NoReturn:
        if "@" in message:
            message = f"{message.partition(':')[0]}: not shown, as it may have a password"
        raise UsageError(f"{message} (see {self.prog} --help)")


def positive_integer(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def number_from_zero(below: float, text: str) -> Callable[[str], float]:
    """Returns the type of an argument that is 0 or more and less than `below`. text: of the error, after the wrong
    value."""

    def parse(value: str) -> float:
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not 0.0 <= number < below:
            raise argparse.ArgumentTypeError(f"{value!r} is {text}")
        return number

    return parse


def add_settings(parser: argparse.ArgumentParser, *, file: bool = True) -> None:
    """Adds the flags that set keys of the configuration. file: also the one that names a file with it."""
    parser.set_defaults(config=None)
    if file:
        parser.add_argument(
            "--config",
            type=Path,
            metavar="FILE",
            help="YAML file with the configuration (default: environment and flags only).",
        )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="Set any key of the configuration, for example --set shadow.rate=0.1.",
    )
    parser.add_argument(
        "--reference",
        metavar="MODEL",
        help="The uncompressed model: a folder, a hub name, or the URL of a vLLM (reference.backend, .model, .url).",
    )
    for flag, (key, placeholder, text) in SHORTHANDS.items():
        parser.add_argument(f"--{flag}", dest=key, metavar=placeholder, help=f"{text} ({key}).")


def load_settings(options: argparse.Namespace) -> Settings:
    """Returns the configuration of these options; raises ConfigError and UsageError."""
    from hemostat.config.loading import load  # noqa: PLC0415

    overrides = [
        (key, value, f"--{flag}")
        for flag, (key, _, _) in SHORTHANDS.items()
        if (value := getattr(options, key)) is not None
    ]
    if options.reference is not None:
        overrides += [(key, value, "--reference") for key, value in _reference(options.reference)]
    for text in options.set:
        key, equals, value = text.partition("=")
        if not equals or not _KEY.fullmatch(key.strip()):
            raise UsageError("--set: write it as KEY=VALUE, like --set shadow.rate=0.1")
        overrides.append((key.strip(), value, f"--set {key.strip()}"))
    return load(options.config, os.environ, overrides)


def _reference(text: str) -> list[tuple[str, str]]:
    """Returns the settings that `--reference` stands for, as pairs of key and value. Raises UsageError."""
    if "://" in text:
        return [("reference.backend", "vllm"), ("reference.url", text)]
    if not text.strip() or (text.startswith(("/", ".", "~")) and not Path(text).expanduser().is_dir()):
        raise UsageError(
            f"--reference: there is no folder {text!r}; give a folder with the uncompressed model, a hub name, or the "
            "URL of a vLLM, like http://127.0.0.1:8001"
        )
    return [("reference.backend", "transformers"), ("reference.model", str(Path(text).expanduser()))]


API_KEY = "HEMOSTAT_UPSTREAM__API_KEY"
"""The environment variable with the servers' API key."""
SERVER = "URL[#NAME] of a vLLM server, and the name of the served model or adapter (default: its first model)."


def vllm_server(
    option: str, address: str, seconds: float, fields: Mapping[str, str] | None = None, *, path: bool = False
) -> tuple[VllmServer, str | None]:
    """Returns a client of the server, and the name that the address gives. option: the name of the argument, for the
    error. seconds: the longest time of an answer. fields: further header fields. path: the address may have a path, as
    a vendor's has. Raises UsageError."""
    from pydantic import SecretStr  # noqa: PLC0415

    from hemostat.config.fields import base_url, server_url  # noqa: PLC0415
    from hemostat.reference.server import VllmServer  # noqa: PLC0415

    # A password, which is refused, may have a #.
    url, _, name = (address, "", "") if "@" in address else address.partition("#")
    key = os.environ.get(API_KEY)
    try:
        secret = SecretStr(key) if key else None
        return VllmServer((base_url if path else server_url)(url), secret, timeout=seconds, fields=fields), name or None
    except ValueError as error:
        raise UsageError(f"{option}: {str(error).replace('use api_key', f'set {API_KEY}')}") from None
