"""Addresses are shown without credentials, whatever these are; other libraries' errors without representations."""

from __future__ import annotations

import http.client
import re
import ssl
import string
import urllib.error

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.support.paths import ROOT

from hemostat_calibration.messages import in_words, shown_address

PRINTABLE = st.text(st.sampled_from(string.printable[:95]), min_size=6, max_size=20)
"""Of a secret: long enough that no part of a message is equal to it by chance."""


@given(
    scheme=st.sampled_from(["http://", "https://", "dns+http://", "postgresql://", "sqlite://", ""]),
    user=st.one_of(st.just(""), PRINTABLE),
    password=PRINTABLE,
    place=st.sampled_from(["postgres:5432/0", "[::1]:5432", "h", "", "h:1/2?prefix=a"]),
)
@example(scheme="postgresql://", user="", password="pass/word", place="postgres:5432/0")
@example(scheme="postgresql://", user="", password="pass#word", place="postgres:5432/0")
@example(scheme="postgresql://", user="", password="1234/5#word", place="postgres:5432/0")
@example(scheme="http://", user="user", password="p://ss@wo:rd", place="h")
def test_no_credentials_are_shown(scheme: str, user: str, password: str, place: str) -> None:
    shown = shown_address(f"{scheme}{user}:{password}@{place}")
    known = scheme.removeprefix("sqlite://")
    assert shown in (f"{known}***", f"{known}***@{place.replace('?prefix=a', '…')}")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://127.0.0.1:8000", None),
        ("dns+http://engines.ai:8000", None),
        ("https://[::1]:8000", None),
        ("postgresql://postgres:5432/2", None),
        ("sqlite:////var/lib/hemostat/a b.db", None),
        ("memory://", None),
        ("localhost:8000", None),
        ("http://h:8000/v1/", "http://h:8000…"),
        ("postgresql://h?password=secret", "postgresql://h…"),
        ("postgresql://user:secret", "postgresql://***"),
        ("postgresql://:secret", "postgresql://***"),
        ("htp://user:secret@h", "***@h"),
        ("sqlite://user:secret@h/x", "***@h…"),
        ("", "***"),
    ],
)
def test_what_is_shown(url: str, shown: str | None) -> None:
    assert shown_address(url) == (url if shown is None else shown)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (urllib.error.URLError(ConnectionRefusedError(111, "Connection refused")), "Connection refused"),
        (urllib.error.URLError("unknown url type"), "unknown url type"),
        (TimeoutError(), "timeout"),
        (TimeoutError("timed out"), "timed out"),
        (httpx.ReadTimeout(""), "read timeout"),
        (httpx.RemoteProtocolError(""), "remote protocol"),
        (http.client.RemoteDisconnected("Remote end closed\nconnection"), "Remote end closed connection"),
        (http.client.IncompleteRead(b"", 5), "incomplete read"),
        (KeyError("choices"), "no choices"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ssl.SSLError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] verify failed (_ssl.c:1006)"), "verify failed"),
        (MemoryError(), "memory"),
        (ValueError("a\n b"), "a b"),
    ],
)
def test_errors_of_other_libraries_in_words(error: Exception, words: str) -> None:
    result = in_words(error)
    assert result == words
    assert not re.search(r"\w+Error\(|\w+\(\d", result)


def test_no_message_has_the_representation_of_an_error() -> None:
    """`in_words` says what it says."""
    error = r"(?:error|exc|exception|failure|cause|reason|problem|refused)"
    pattern = re.compile(rf"\{{{error}!r\}}|repr\({error}\)|%r.*\b{error}\b")
    sources = [path for folder in ("middleware", "calibration") for path in (ROOT / folder).rglob("*.py")]
    result = [f"{path}: {text}" for path in sources for text in pattern.findall(path.read_text(encoding="utf-8"))]
    assert result == []
