"""The background thread of one rank: reports what it holds, fetches what it lacks, flushes what was tapped.

It may be slow, refused or without a peer: decoding does not wait for it and does not notice. Every failure is counted,
backed off, and logged once until it changes.

A deployment of several replicas has an admin port each. All of them hear what is held; what is to be held is what any
of them asks for, the one that leads first; a profile is fetched from whoever has it; what was tapped goes to the
replica that asked for it, which the beginning of the nonce tells.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from hemostat_calibration.errors import HemostatError, InvalidArgumentError, InvalidProfileError
from hemostat_calibration.profiles.profile import MAX_BYTES, VERSION_PATTERN, CalibrationProfile
from hemostat_engine.library import HELD_AT_MOST, Counters, Library
from hemostat_engine.taps import Taps

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
RESOLVE_SECONDS = 5.0
PEERS_AT_MOST = 32
EVERY_ADDRESS = "dns+"
"""Before an address of HEMOSTAT_ADMIN_URL: all that the name stands for (a headless Service), one replica each."""


def _parts(url: str) -> urllib.parse.SplitResult:
    """InvalidArgumentError for what is no address of an admin port."""
    every = url.startswith(EVERY_ADDRESS)
    try:
        parts = urllib.parse.urlsplit(url.removeprefix(EVERY_ADDRESS))
        wrong = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0
    except ValueError:
        wrong = True
    if wrong:
        raise InvalidArgumentError(f"HEMOSTAT_ADMIN_URL is {url!r}: it must be like http://127.0.0.1:9091")
    if every and parts.scheme != "http":
        raise InvalidArgumentError(f"HEMOSTAT_ADMIN_URL is {url!r}: addresses have no certificate; use dns+http")
    return parts


@dataclass(frozen=True, slots=True)
class Settings:
    """Where profiles come from; neither: every request gets identity.

    admin_url: one address, or one of each replica between commas; `dns+http://name:port` is every address of the name.
    """

    admin_url: str | None = None
    admin_token: str | None = None
    profile_dir: Path | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """HEMOSTAT_ADMIN_URL, HEMOSTAT_ADMIN_TOKEN, HEMOSTAT_PROFILE_DIR; InvalidArgumentError on a bad one."""
        given = environment.get("HEMOSTAT_ADMIN_URL") or ""
        urls = [part.strip().rstrip("/") for part in given.split(",") if part.strip()]
        for url in urls:
            _parts(url)
        folder = environment.get("HEMOSTAT_PROFILE_DIR") or None
        return cls(
            ",".join(urls) or None, environment.get("HEMOSTAT_ADMIN_TOKEN") or None, Path(folder) if folder else None
        )


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


@dataclass(frozen=True, slots=True)
class Answer:
    """To a report. hold: versions, most important first. leads: the replica decides what serves. replica: what the
    nonces of its requests begin with."""

    hold: tuple[str, ...] = ()
    leads: bool = True
    replica: str = ""


class AdminClient:
    """The three calls to the admin port; every failure is a FetchError."""

    def __init__(self, url: str, token: str | None) -> None:
        self._url = url
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        # No proxy of the environment's either: it would be shown the token.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)

    def report(self, body: dict[str, Any]) -> Answer:
        """Send a report; what is to be held is digest-shaped."""
        answer = self._call("/api/v1/engine/report", ANSWER_BYTES_AT_MOST, json.dumps(body).encode(), "json")
        try:
            said = json.loads(answer)
            hold = tuple(version for version in said["hold"] if VERSION_PATTERN.fullmatch(version))
            return Answer(hold, said.get("leads") is not False, str(said.get("replica") or ""))
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


class Peer:
    """One replica's admin port, and what it said last."""

    def __init__(self, url: str, token: str | None) -> None:
        self.url = url
        self.client = AdminClient(url, token)
        self.said: Answer | None = None
        self.next_report = 0.0


class Peers:
    """The admin ports that the setting names, now: `refresh` asks again which addresses a name has."""

    def __init__(self, settings: Settings) -> None:
        self._urls = settings.admin_url.split(",") if settings.admin_url else []
        self._token = settings.admin_token
        self._next_look = 0.0
        self._found: dict[str, list[str]] = {}
        self.all: list[Peer] = []

    def __bool__(self) -> bool:
        return bool(self._urls)

    def refresh(self, now: float) -> None:
        if now < self._next_look:
            return
        self._next_look = now + RESOLVE_SECONDS
        urls = dict.fromkeys(address for url in self._urls for address in self._addresses(url))
        known = {peer.url: peer for peer in self.all}
        self.all = [known.get(url) or Peer(url, self._token) for url in list(urls)[:PEERS_AT_MOST]]

    def _addresses(self, url: str) -> list[str]:
        """A name that cannot be resolved just now stands for what it stood for."""
        if not url.startswith(EVERY_ADDRESS):
            return [url]
        parts = _parts(url)
        try:
            found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
        except OSError:
            return self._found.get(url, [])
        hosts = sorted({str(address[0]) for *_, address in found})
        self._found[url] = [f"http://{f'[{h}]' if ':' in h else h}:{parts.port or 80}" for h in hosts]
        return self._found[url]

    def hold(self) -> tuple[str, ...]:
        """What any replica asks for, the one that leads first."""
        said = [peer.said for peer in self.all if peer.said is not None]
        said.sort(key=lambda answer: not answer.leads)
        return tuple(version for answer in said for version in answer.hold)


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
        self._peers = Peers(settings)
        self._clock = clock
        self._backoff = Backoff()
        self._said: dict[str, str] = {}
        self._next_scan = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, if there is anything that it could talk to."""
        if not self._peers and self._folder is None:
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
        self._peers.refresh(now)
        if self._peers.all and len(self._taps):
            self._flush(now)
        if self._folder is not None and now >= self._next_scan:
            self._next_scan = now + REPORT_SECONDS
            self._scan(self._folder, now)
        for peer in self._peers.all:
            if now >= peer.next_report and self._backoff.may(self._of("report", peer), now):
                self._report(peer, now)
        for version in self._library.missing():
            if self._backoff.may(version, now):
                self._fetch(version, now)

    def _of(self, what: str, peer: Peer) -> str:
        return what if len(self._peers.all) == 1 else f"{what} to {peer.url}"

    def _report(self, peer: Peer, now: float) -> None:
        peer.next_report = now + REPORT_SECONDS
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
            peer.said = peer.client.report(body)
        except FetchError as error:
            # What it asked for last is held on, after what the others ask for: it may be back soon.
            peer.said = peer.said and replace(peer.said, leads=False)
            self._counters.add("report_errors")
            self._failed(self._of("report", peer), error, now)
            return
        self._succeeded(self._of("report", peer))
        self._library.hold(self._peers.hold())

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
        for peer in self._peers.all:
            peer.next_report = 0.0

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
        failure = FetchError(f"profile {version} is not in HEMOSTAT_PROFILE_DIR", 404)
        # First who asks for it; a replica that does not answer keeps nobody from asking the next one.
        for peer in sorted(self._peers.all, key=lambda p: p.said is None or version not in p.said.hold):
            try:
                return peer.client.profile(version)
            except FetchError as error:
                failure = error if error.status != 404 or failure.status == 404 else failure
        raise failure

    def _flush(self, now: float) -> None:
        peers = [peer for peer in self._peers.all if self._backoff.may(self._of("tap", peer), now)]
        if not peers:
            # What waits is kept as long as there is room: the queue drops, and counts, what comes on top.
            return
        runs = self._taps.drain(STEPS_A_FLUSH, FEATURE_BYTES_A_FLUSH)
        unsent = sum(run["tokens"] for run in runs)
        for peer in peers:
            theirs = [run for run in runs if self._asked(peer, run["nonce"])]
            rows = sum(run["tokens"] for run in theirs)
            if not theirs:
                continue
            try:
                peer.client.tap({"boot_id": self.identity.boot_id, "taps": theirs})
            except FetchError as error:
                self._failed(self._of("tap", peer), error, now)
                continue
            unsent -= rows
            self._counters.add("taps_sent", rows)
            self._succeeded(self._of("tap", peer))
        if unsent:
            self._counters.add("taps_dropped", unsent)

    def _asked(self, peer: Peer, nonce: str) -> bool:
        """Whether the tapped request came through this replica; with one alone, all did."""
        if len(self._peers.all) == 1:
            return True
        return peer.said is not None and bool(peer.said.replica) and nonce.startswith(f"{peer.said.replica}-")

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
