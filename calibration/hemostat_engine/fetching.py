"""Gets profiles from the folder or from the replicas and puts them into the library."""

from __future__ import annotations

import logging
from pathlib import Path

from hemostat_calibration.errors import InvalidProfileError
from hemostat_calibration.profiles.profile import MAX_BYTES, VERSION_PATTERN, CalibrationProfile
from hemostat_engine.admin_client import FetchError
from hemostat_engine.library import MAX_PROFILES, Counters, Library
from hemostat_engine.peers import Peers
from hemostat_engine.retries import Retries

log = logging.getLogger("hemostat.engine")

SCAN_SECONDS = 1.0
"""Between two looks into the folder."""


class Fetcher:
    """Fills `library`. Failures are counted, and retried after a pause."""

    def __init__(
        self, folder: Path | None, peers: Peers, library: Library, counters: Counters, retries: Retries
    ) -> None:
        self._folder = folder
        self._peers = peers
        self._library = library
        self._counters = counters
        self._retries = retries
        self._next_scan = 0.0

    def scan(self, now: float) -> None:
        """Load the newest profiles of the folder, if SCAN_SECONDS have passed."""
        if self._folder is None or now < self._next_scan:
            return
        self._next_scan = now + SCAN_SECONDS
        try:
            named = [p for p in self._folder.glob("*.safetensors") if VERSION_PATTERN.fullmatch(p.stem)]
            newest = sorted(named, key=lambda path: path.stat().st_mtime, reverse=True)[:MAX_PROFILES]
        except OSError as error:
            self._retries.failed("scan", error, now)
            return
        self._retries.succeeded("scan")
        held = set(self._library.versions())
        for path in newest:
            if path.stem not in held and self._retries.may_try(path.stem, now):
                self._fetch(path.stem, now)

    def fetch_missing(self, now: float) -> None:
        """Fetch what the library lacks."""
        for version in self._library.missing():
            if self._retries.may_try(version, now):
                self._fetch(version, now)

    def _fetch(self, version: str, now: float) -> None:
        """Read one profile, check its digest, and put it into the library."""
        try:
            profile = CalibrationProfile.from_bytes(read_profile(version, self._folder, self._peers), version)
            if not self._library.put(profile):
                full = InvalidProfileError(f"no room for profile {version}: {MAX_PROFILES} are held")
                self._retries.failed(version, full, now)
                return
        except InvalidProfileError as error:
            self._counters.add("profiles_refused")
            self._retries.failed(version, error, now)
            return
        except FetchError as error:
            self._counters.add("profiles_missing" if error.status == 404 else "fetch_errors")
            self._retries.failed(version, error, now)
            if error.status == 404:
                # A client named a version that does not exist; if it is named again, it is looked for again.
                self._library.forget(version)
            return
        self._retries.succeeded(version)
        log.info("loaded profile %s", version)
        # The control process serves only profiles that engines have acknowledged: report at once.
        for peer in self._peers.all:
            peer.next_report = 0.0


def read_profile(version: str, folder: Path | None, peers: Peers) -> bytes:
    """The file of a profile: from the folder, else from a replica. FetchError with status 404: not found."""
    if not VERSION_PATTERN.fullmatch(version):  # it becomes part of a path and of a URL
        raise InvalidProfileError(f"{version!r} is not a profile version")
    if folder is not None:
        try:
            with (folder / f"{version}.safetensors").open("rb") as file:
                return file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise FetchError(f"profile {version}: {error.strerror}") from None
    failure = FetchError(f"profile {version} is not in HEMOSTAT_PROFILE_DIR", 404)
    # The replicas that asked for it come first; if one fails, the next is tried.
    for peer in sorted(peers.all, key=lambda p: not p.wants(version)):
        try:
            return peer.client.profile(version)
        except FetchError as error:
            failure = error if error.status != 404 or failure.status == 404 else failure
    raise failure
