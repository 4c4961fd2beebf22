"""The engine token of a `hemostat serve` without a configuration file, which a file of the user keeps."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from hemostat.commands.arguments import UsageError
from hemostat.config.fields import is_secret

MAX_BYTES = 4096


def token_file() -> Path:
    """Returns `$XDG_STATE_HOME/hemostat/engine-token`, by default below `~/.local/state`."""
    state = os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
    return Path(state) / "hemostat" / "engine-token"


def kept_token() -> str:
    """Returns the token in `token_file`, which is made with a random one if it is missing.

    A vLLM that was started with this token then needs no other one when Hemostat starts again. Returns a random token
    where the file cannot be made or read, as in a container whose root is read-only. Raises UsageError if others than
    the user can read it, or if it holds no token.
    """
    with suppress(OSError, RuntimeError):  # a user without a home folder is a RuntimeError
        path = token_file()
        try:
            return _read(path)
        except FileNotFoundError:
            _make(path)
            return _read(path)
    return _random()


def _random() -> str:
    return secrets.token_hex(12)


def _make(path: Path) -> None:
    """Makes the file, complete from the moment that it has its name; one that another process has made stays."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    written = path.with_name(f".{path.name}-{os.getpid()}")
    with suppress(FileNotFoundError):
        written.unlink()
    with open(os.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        file.write(_random() + "\n")
    try:
        with suppress(FileExistsError):
            os.link(written, path)
    finally:
        written.unlink()


def _read(path: Path) -> str:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o077:
            raise UsageError(f"{path}: has to be a file of yours that others cannot read: chmod 600 it, or remove it")
        text = file.read(MAX_BYTES).decode("ascii", "replace").strip()
    if not is_secret(text):
        raise UsageError(f"{path}: does not hold a token, one line of printable ASCII: remove it, and it is made anew")
    return text
