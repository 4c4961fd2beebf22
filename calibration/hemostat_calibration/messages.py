"""The forms in which messages show addresses and other libraries' errors: no credentials, no representations of
objects."""

from __future__ import annotations

import re

_SCHEME = re.compile(r"((dns\+)?https?|postgres(ql)?)://", re.IGNORECASE)
_FILE = re.compile(r"sqlite:///[^@]*|memory://")
_PLACE = re.compile(r"((?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)(?::\d{1,5})?(?:/\d{0,3})?)(?:[/?#].*)?", re.DOTALL)
"""A host with its port and the number of a database; then what is not shown."""
MAX_CHARACTERS = 300
MAX_LINE_CHARACTERS = 500
_ERROR_NUMBER = re.compile(r"^\[(Errno -?\d+|SSL: \w+)\] | \(_ssl\.c:\d+\)$")
_CLASS_WORDS = re.compile(r"[A-Z]+(?=[A-Z][a-z]|$)|[A-Z]?[a-z]+")


def shown_address(url: str) -> str:
    """Returns a URL as messages show it: without user, password, path and query, also where it is malformed, since a
    password may hold any character that has a meaning in URLs.

    >>> shown_address("postgresql://user:pass/wo#rd@db:5432/0")
    'postgresql://***@db:5432/0'
    >>> shown_address("http://127.0.0.1:8000/v1?key=secret")
    'http://127.0.0.1:8000…'
    >>> shown_address("postgresql://:pass")
    'postgresql://***'
    """
    if _FILE.fullmatch(url):
        return url
    match = _SCHEME.match(url)
    scheme = match.group() if match else ""
    _, at, place = url[len(scheme) :].rpartition("@")
    parts = _PLACE.fullmatch(place)
    if parts is None:
        return f"{scheme}***"
    return f"{scheme}{'***@' if at else ''}{parts[1]}{'…' if parts[1] != place else ''}"


def with_detail(state: str, detail: str) -> str:
    """
    >>> with_detail("building", "reading the checkpoints"), with_detail("idle", "")
    ('building: reading the checkpoints', 'idle')
    """
    return f"{state}: {detail}" if detail else state


def one_line(error: BaseException) -> str:
    """Returns the text of an error in one line, at most `MAX_LINE_CHARACTERS` of it. It is the name of the error's
    class if the error says nothing.

    >>> one_line(ValueError("two\\nlines")), one_line(ValueError())
    ('two lines', 'ValueError')
    """
    return " ".join(str(error).split())[:MAX_LINE_CHARACTERS] or type(error).__name__


def in_words(error: BaseException) -> str:
    """Returns what an error of another library says, in one line of at most `MAX_CHARACTERS`. It is the name of the
    error's class if the error says nothing.

    >>> in_words(ConnectionRefusedError(111, "Connection refused"))
    'Connection refused'
    >>> in_words(TimeoutError())
    'timeout'
    """
    cause = getattr(error, "reason", None)  # urllib wraps what the connection raised
    if isinstance(cause, BaseException):
        return in_words(cause)
    if isinstance(error, KeyError) and error.args:
        return f"no {error.args[0]}"
    text = getattr(error, "strerror", None) or str(error)
    if isinstance(cause, str) and text.startswith("<"):
        text = cause
    text = _ERROR_NUMBER.sub("", " ".join(text.split()))[:MAX_CHARACTERS]
    if not text or text.startswith(f"{type(error).__name__}("):
        words = [word.lower() for word in _CLASS_WORDS.findall(type(error).__name__)]
        text = " ".join(words if words == ["error"] or words[-1:] != ["error"] else words[:-1])
    return text
