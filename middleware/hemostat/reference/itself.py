"""Finds out if the reference is the served model itself: then every divergence would be of a model from itself."""

from __future__ import annotations

import asyncio
import os
import socket
from urllib.parse import urlsplit

from hemostat.checkpoints.checkpoint_digest import checkpoint_digest
from hemostat.reference.protocol import ReferenceInfo
from hemostat.reference.server import VllmServer

DEFAULT_PORTS = {"http": 80, "https": 443}


async def same_model(info: ReferenceInfo, url: str | None, server: VllmServer, served: str) -> str:
    """Returns how it is known that `served` on the upstream `server` is the reference `info`; "" if nothing says so.

    url: the URL of the reference, if it is a server. Raises ReferenceFailure if the upstream could not be asked.
    """
    if url is not None and info.model == served and await asyncio.to_thread(_same_address, url, server.url):
        return f"{url} is the upstream, and serves the same model"
    root = (await server.model(served)).root or ""
    if info.folder is None or not await asyncio.to_thread(_same_files, str(info.folder), root):
        return ""
    return f"the upstream loaded {served} from {root}, which has the same files as {info.folder}"


def _same_files(first: str, other: str) -> bool:
    """Returns True if two folders have the same files; False if one of them is not a folder on this machine."""
    if not (os.path.isdir(first) and os.path.isdir(other)):
        return False
    return os.path.samefile(first, other) or checkpoint_digest(first, None) == checkpoint_digest(other, None)


def _same_address(first: str, other: str) -> bool:
    return first == other or bool(_addresses(first) & _addresses(other))


def _addresses(url: str) -> set[object]:
    parts = urlsplit(url)
    try:
        result = socket.getaddrinfo(parts.hostname, parts.port or DEFAULT_PORTS[parts.scheme], type=socket.SOCK_STREAM)
    except OSError:
        return set()
    return {address[:2] for *_, address in result}
