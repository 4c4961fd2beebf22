"""The address of a vLLM server on the command line: URL[#NAME], and the API key from the environment."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hemostat.commands.arguments import UsageError

if TYPE_CHECKING:
    from hemostat.reference.server import VllmServer

KEY = "HEMOSTAT_UPSTREAM__API_KEY"
"""The environment variable with the servers' API key."""
SERVER = "URL[#NAME] of a vLLM server, and the name of the served model or adapter (default: its first model)."


def vllm_server(option: str, address: str, seconds: float) -> tuple[VllmServer, str | None]:
    """Returns a client of the server, and the name that the address gives. option: the name of the argument, for the
    error. seconds: the longest time of an answer. Raises UsageError."""
    from pydantic import SecretStr  # noqa: PLC0415

    from hemostat.config.fields import server_url  # noqa: PLC0415
    from hemostat.reference.server import VllmServer  # noqa: PLC0415

    # A password, which is refused, may have a #.
    url, _, name = (address, "", "") if "@" in address else address.partition("#")
    key = os.environ.get(KEY)
    try:
        return VllmServer(server_url(url), SecretStr(key) if key else None, timeout=seconds), name or None
    except ValueError as error:
        raise UsageError(f"{option}: {str(error).replace('use api_key', f'set {KEY}')}") from None
