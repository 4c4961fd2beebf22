"""The HTTP client for one admin port."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any

import msgspec

from hemostat_calibration.engine_keys import SECRET_CHARACTERS
from hemostat_calibration.errors import HemostatError
from hemostat_calibration.messages import in_words
from hemostat_calibration.passive import PassivePolicy
from hemostat_calibration.profiles.profile import MAX_BYTES, VERSION_PATTERN

TIMEOUT_SECONDS = 5.0
"""The longest time without a byte."""
MAX_ANSWER_SECONDS = 120.0
"""The longest time for a whole answer: a profile may have 255 MiB."""
MAX_RESPONSE_BYTES = 64 * 1024
MAX_SECRETS = 4
"""The largest size of one answer."""


class FetchError(HemostatError):
    """The admin port did not respond as expected. `status` is the HTTP status, 0 without a response."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class ReportResponse:
    """The response to a report.

    hold: versions that this engine should hold, most important first.
    nonce_prefix: of the requests that came through this middleware.
    secrets: under which its requests are signed (`hemostat_calibration.engine_keys`).
    passive: which requests the plugin samples itself; None if it samples none.
    """

    hold: tuple[str, ...] = ()
    nonce_prefix: str = ""
    secrets: tuple[str, ...] = field(default=(), repr=False)
    passive: PassivePolicy | None = field(default=None, repr=False)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would send the token to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


class AdminClient:
    """The calls to the admin port. Every failure is a FetchError."""

    def __init__(self, url: str, token: str | None) -> None:
        self._url = url
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        # Proxies of the environment are ignored: they would receive the token.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)

    def report(self, body: dict[str, Any]) -> ReportResponse:
        """Sends a report, and returns the response. Names in the response that are not profile versions are ignored."""
        data = self._call("/api/v1/engine/report", MAX_RESPONSE_BYTES, json.dumps(body).encode(), "json")
        try:
            response = json.loads(data)
            hold = tuple(version for version in response["hold"] if VERSION_PATTERN.fullmatch(version))
            return ReportResponse(hold, str(response.get("nonce_prefix") or ""), _secrets(response))
        except (ValueError, TypeError, KeyError):
            raise FetchError("the admin port's answer to a report has no list 'hold'") from None

    def send_taps(self, body: dict[str, Any]) -> None:
        self._call("/api/v1/engine/tap", MAX_RESPONSE_BYTES, msgspec.msgpack.encode(body), "msgpack")

    def send_answers(self, body: dict[str, Any]) -> ReportResponse:
        """Returns the prefix of the nonces of this middleware's requests ("" if it has none), its secrets, and its
        policy for passive mode."""
        data = self._call("/api/v1/engine/answers", MAX_RESPONSE_BYTES, msgspec.msgpack.encode(body), "msgpack")
        try:
            response = json.loads(data)
            passive = msgspec.convert(response.get("passive"), PassivePolicy | None)
            return ReportResponse((), str(response["nonce_prefix"] or ""), _secrets(response), passive)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise FetchError("the admin port's answer to answers has no 'nonce_prefix'") from None

    def profile(self, version: str) -> bytes:
        """Returns the file of a profile. Raises FetchError with status 404 if the middleware does not have it."""
        return self._call(f"/api/v1/engine/profiles/{version}", MAX_BYTES)

    def _call(self, path: str, max_bytes: int, data: bytes | None = None, subtype: str = "") -> bytes:
        """Sends a GET, or a POST of `data` as application/`subtype`, and returns the response's body. Raises FetchError
        if it is above `max_bytes`."""
        headers = self._headers | ({"content-type": f"application/{subtype}"} if data is not None else {})
        request = urllib.request.Request(self._url + path, data, headers)  # noqa: S310 - Settings admits http(s) only
        try:
            with self._opener.open(request, timeout=TIMEOUT_SECONDS) as response:
                body = _read(response, max_bytes)
        except urllib.error.HTTPError as error:
            with error:
                hint = "; see HEMOSTAT_ENGINE_TOKEN" if error.code in (401, 403) else ""
                raise FetchError(f"{path}: HTTP {error.code}{hint}", error.code) from None
        except (OSError, http.client.HTTPException) as error:
            raise FetchError(f"{self._url}: {in_words(error)}") from None
        if len(body) > max_bytes:
            raise FetchError(f"{path}: an answer of more than {max_bytes} bytes")
        return body


def _secrets(response: dict[str, Any]) -> tuple[str, ...]:
    """Returns the secrets of an answer; none where it is of a middleware that has none yet. Raises TypeError."""
    given = response.get("secrets") or ()
    return tuple(s for s in given if isinstance(s, str) and len(s) == SECRET_CHARACTERS and s.isascii())[:MAX_SECRETS]


def _read(response: Any, max_bytes: int) -> bytes:
    """Returns the body, at most one byte more than `max_bytes`. Raises TimeoutError if that takes too long, however
    many bytes come.
    """
    ends = time.monotonic() + MAX_ANSWER_SECONDS
    body = bytearray()
    while len(body) <= max_bytes and (chunk := response.read1(max_bytes + 1 - len(body))):
        body += chunk
        if time.monotonic() > ends:
            raise TimeoutError(f"the answer takes more than {MAX_ANSWER_SECONDS:g} s")
    return bytes(body)
