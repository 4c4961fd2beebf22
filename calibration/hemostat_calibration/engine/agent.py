"""The background thread of one rank: reports what it holds, fetches what it lacks, flushes what was tapped.

It may be slow, refused or without a peer: decoding does not wait for it and does not notice. Every failure is counted,
backed off, and logged once until it changes.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from hemostat_calibration.engine.library import HELD_AT_MOST, Counters, Library
from hemostat_calibration.engine.taps import Taps
from hemostat_calibration.errors import HemostatError, InvalidArgumentError, InvalidProfileError
from hemostat_calibration.profile import MAX_BYTES, VERSION_PATTERN, CalibrationProfile

log = logging.getLogger("hemostat.engine")

TICK_SECONDS = 0.25
REPORT_SECONDS = 1.0
TIMEOUT_SECONDS = 5.0
BACKOFF_SECONDS = (1.0, 60.0)
"""First and longest pause after a failure; it doubles in between."""
ANSWER_BYTES_AT_MOST = 64 * 1024
STEPS_A_FLUSH = 256
FEATURE_BYTES_A_FLUSH = 8 << 20
"""After the step that reaches it; the admin port takes twice as much."""
BACKOFFS_REMEMBERED = 256


@dataclass(frozen=True, slots=True)
class Settings:
    """Where profiles come from; neither: every request gets identity."""

    admin_url: str | None = None
    admin_token: str | None = None
    profile_dir: Path | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """HEMOSTAT_ADMIN_URL, HEMOSTAT_ADMIN_TOKEN, HEMOSTAT_PROFILE_DIR; InvalidArgumentError on a bad one."""
        url = environment.get("HEMOSTAT_ADMIN_URL") or None
        if url is not None:
            parts = urllib.parse.urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise InvalidArgumentError(f"HEMOSTAT_ADMIN_URL is {url!r}: it must be like http://127.0.0.1:9091")
            url = url.rstrip("/")
        folder = environment.get("HEMOSTAT_PROFILE_DIR") or None
        return cls(url, environment.get("HEMOSTAT_ADMIN_TOKEN") or None, Path(folder) if folder else None)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who reports. boot_id: shared by the ranks of one engine, new with every start."""

    boot_id: str
    rank: int
    world_size: int
    vocab_size: int
    runner: str
    vllm: str


class FetchError(HemostatError):
    """A peer did not answer as it should; the text says what it did. `status` is HTTP's, 0 without an answer."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the token to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


class AdminClient:
    """The three calls to the admin port; every failure is a FetchError."""

    def __init__(self, url: str, token: str | None) -> None:
        self._url = url
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        # No proxy of the environment's either: it would be shown the token.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)

    def report(self, body: dict[str, Any]) -> tuple[str, ...]:
        """Send a report; the digest-shaped names of what is to be held."""
        answer = self._call("/api/v1/engine/report", ANSWER_BYTES_AT_MOST, json.dumps(body).encode(), "json")
        try:
            hold = json.loads(answer)["hold"]
            return tuple(version for version in hold if VERSION_PATTERN.fullmatch(version))
        except (ValueError, TypeError, KeyError):
            raise FetchError("the admin port's answer to a report has no list 'hold'") from None

    def tap(self, body: dict[str, Any]) -> None:
        self._call("/api/v1/engine/tap", ANSWER_BYTES_AT_MOST, msgspec.msgpack.encode(body), "msgpack")

    def profile(self, version: str) -> bytes:
        return self._call(f"/api/v1/engine/profiles/{version}", MAX_BYTES)

    def _call(self, path: str, limit: int, data: bytes | None = None, form: str = "") -> bytes:
        """GET, or POST of `data` as application/`form`; an answer of up to `limit` bytes."""
        headers = self._headers | ({"content-type": f"application/{form}"} if data is not None else {})
        request = urllib.request.Request(self._url + path, data, headers)  # noqa: S310 - Settings admits http(s) only
        try:
            with self._opener.open(request, timeout=TIMEOUT_SECONDS) as response:
                answer: bytes = response.read(limit + 1)
        except urllib.error.HTTPError as error:
            with error:
                raise FetchError(f"{path}: HTTP {error.code}", error.code) from None
        except (OSError, http.client.HTTPException) as error:
            raise FetchError(f"{self._url}: {error!r}") from None
        if len(answer) > limit:
            raise FetchError(f"{path}: an answer of more than {limit} bytes")
        return answer


class Backoff:
    """When a thing that failed may be tried again, by name; bounded, and pure but for the clock that is passed in."""

    def __init__(self) -> None:
        self._until: dict[str, tuple[float, float]] = {}

    def may(self, name: str, now: float) -> bool:
        return self._until.get(name, (0.0, 0.0))[0] <= now

    def failed(self, name: str, now: float) -> None:
        first, longest = BACKOFF_SECONDS
        pause = min(2 * self._until[name][1], longest) if name in self._until else first
        self._until.pop(name, None)
        self._until[name] = (now + pause, pause)
        while len(self._until) > BACKOFFS_REMEMBERED:
            del self._until[next(iter(self._until))]

    def succeeded(self, name: str) -> None:
        self._until.pop(name, None)


class Agent:
    """`start()` once; `tick(now)` is what the thread does four times a second."""

    def __init__(
        self,
        identity: Identity,
        settings: Settings,
        library: Library,
        counters: Counters,
        taps: Taps,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.identity = identity
        self._library = library
        self._counters = counters
        self._taps = taps
        self._folder = settings.profile_dir
        self._admin = AdminClient(settings.admin_url, settings.admin_token) if settings.admin_url else None
        self._clock = clock
        self._backoff = Backoff()
        self._said: dict[str, str] = {}
        self._next_report = 0.0
        self._next_scan = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, if there is anything that it could talk to."""
        if self._admin is None and self._folder is None:
            log.warning("neither HEMOSTAT_ADMIN_URL nor HEMOSTAT_PROFILE_DIR is set: every request gets identity")
            return
        self._thread = threading.Thread(target=self._run, name="hemostat-agent", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; it is a daemon, so this is for tests and orderly ends."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(TICK_SECONDS):
            try:
                self.tick(self._clock())
            except Exception:
                # This thread is all that brings profiles: a bug in one tick must not end it silently.
                self._counters.add("agent_errors")
                log.exception("hemostat agent")

    def tick(self, now: float) -> None:
        """Flush, scan, report and fetch, each where it is due and not backed off."""
        if self._admin is not None and len(self._taps):
            self._flush(self._admin, now)
        if self._folder is not None and now >= self._next_scan:
            self._next_scan = now + REPORT_SECONDS
            self._scan(self._folder, now)
        if self._admin is not None and now >= self._next_report and self._backoff.may("report", now):
            self._report(self._admin, now)
        for version in self._library.missing():
            if self._backoff.may(version, now):
                self._fetch(version, now)

    def _report(self, admin: AdminClient, now: float) -> None:
        self._next_report = now + REPORT_SECONDS
        who = self.identity
        body = {
            "boot_id": who.boot_id,
            "rank": who.rank,
            "world_size": who.world_size,
            "versions": self._library.versions(),
            "vocab_size": who.vocab_size,
            "counters": self._counters.read(),
            "runner": who.runner,
            "vllm": who.vllm,
        }
        try:
            self._library.hold(admin.report(body))
        except FetchError as error:
            self._counters.add("report_errors")
            self._failed("report", error, now)
            return
        self._succeeded("report")

    def _scan(self, folder: Path, now: float) -> None:
        """Hold the newest profiles of the folder."""
        try:
            named = [p for p in folder.glob("*.safetensors") if VERSION_PATTERN.fullmatch(p.stem)]
            newest = sorted(named, key=lambda path: path.stat().st_mtime, reverse=True)[:HELD_AT_MOST]
        except OSError as error:
            self._failed("scan", error, now)
            return
        self._succeeded("scan")
        held = set(self._library.versions())
        for path in newest:
            if path.stem not in held and self._backoff.may(path.stem, now):
                self._fetch(path.stem, now)

    def _fetch(self, version: str, now: float) -> None:
        """Read one profile, check its digest, and hold it. `version` is digest-shaped, so it can name a file."""
        try:
            profile = CalibrationProfile.from_bytes(self._read(version), version)
            if not self._library.put(profile):
                self._failed(
                    version, InvalidProfileError(f"no room for profile {version}: {HELD_AT_MOST} are held"), now
                )
                return
        except InvalidProfileError as error:
            self._counters.add("profiles_refused")
            self._failed(version, error, now)
            return
        except FetchError as error:
            # A client that names a version which nobody has is no failure of ours; named again, it is asked for again.
            self._counters.add("profiles_missing" if error.status == 404 else "fetch_errors")
            self._failed(version, error, now)
            if error.status == 404:
                self._library.forget(version)
            return
        self._succeeded(version)
        log.info("holds profile %s", version)
        # The control process serves only what is acknowledged: say so at once.
        self._next_report = 0.0

    def _read(self, version: str) -> bytes:
        if not VERSION_PATTERN.fullmatch(version):
            raise InvalidProfileError(f"{version!r} is no profile version")
        if self._folder is not None:
            try:
                with (self._folder / f"{version}.safetensors").open("rb") as file:
                    return file.read(MAX_BYTES + 1)
            except FileNotFoundError:
                pass
            except OSError as error:
                raise FetchError(f"profile {version}: {error.strerror}") from None
        if self._admin is None:
            raise FetchError(f"profile {version} is not in HEMOSTAT_PROFILE_DIR", 404)
        return self._admin.profile(version)

    def _flush(self, admin: AdminClient, now: float) -> None:
        if not self._backoff.may("tap", now):
            # What waits is kept as long as there is room: the queue drops, and counts, what comes on top.
            return
        runs = self._taps.drain(STEPS_A_FLUSH, FEATURE_BYTES_A_FLUSH)
        rows = sum(run["tokens"] for run in runs)
        try:
            admin.tap({"boot_id": self.identity.boot_id, "taps": runs})
        except FetchError as error:
            self._counters.add("taps_dropped", rows)
            self._failed("tap", error, now)
            return
        self._counters.add("taps_sent", rows)
        self._succeeded("tap")

    def _failed(self, what: str, error: Exception, now: float) -> None:
        self._backoff.failed(what, now)
        text = str(error)
        if self._said.get(what) != text:
            self._said[what] = text
            if len(self._said) > BACKOFFS_REMEMBERED:
                del self._said[next(iter(self._said))]
            log.warning("%s", text)

    def _succeeded(self, what: str) -> None:
        self._backoff.succeeded(what)
        if self._said.pop(what, None) is not None:
            log.info("%s works again", what)
