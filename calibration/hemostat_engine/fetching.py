"""The thread that gets profiles from the folder or from the admin ports and puts them into the library.

Neither decoding nor a report waits for it. A port that does not answer is left out for a while, and what clients
name is fetched after what the control process asks for, at a bounded rate.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from hemostat_calibration.errors import InvalidProfileError
from hemostat_calibration.profiles.profile import MAX_BYTES, VERSION_PATTERN, CalibrationProfile
from hemostat_engine.admin_client import FetchError
from hemostat_engine.library import MAX_PROFILES, Counters, Library
from hemostat_engine.peers import Peers
from hemostat_engine.retries import Allowance, Retries

log = logging.getLogger("hemostat.engine")

SCAN_SECONDS = 1.0
"""The time between two looks into the folder."""
NAMED_PER_SECOND, MAX_NAMED = 1.0, 4.0
"""The limits of fetches of versions that only requests named."""


class Fetcher:
    """Fills `library`. Failures are counted, and retried after a pause. loaded: called when a profile is there."""

    def __init__(
        self, folder: Path | None, peers: Peers, library: Library, counters: Counters, loaded: Callable[[], None]
    ) -> None:
        self._folder = folder
        self._peers = peers
        self._library = library
        self._counters = counters
        self._loaded = loaded
        self._retries = Retries()
        # Apart: clients would push out what is known of others. Nor do they fill the log.
        self._retries_of_named = Retries(logging.DEBUG)
        self._allowance = Allowance(NAMED_PER_SECOND, MAX_NAMED, 0.0)
        self._next_scan = 0.0

    def tick(self, now: float) -> None:
        """Scans the folder, and fetches what the library lacks: each if it is due and not paused after a failure."""
        self._scan(now)
        if self._peers and not self._peers.all:
            return  # no address is known yet: each version would count as one that does not exist
        for version in self._library.missing():
            if self._retries.may_try(version, now):
                self._fetch(version, now, self._retries)
        for version in self._library.requested():
            if self._retries_of_named.may_try(version, now) and self._allowance.take(now):
                self._fetch(version, now, self._retries_of_named)

    def _scan(self, now: float) -> None:
        """Loads the newest profiles of the folder, if SCAN_SECONDS have passed."""
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
        for version in self._library.absent(path.stem for path in newest):
            if self._retries.may_try(version, now):
                self._fetch(version, now, self._retries)

    def _fetch(self, version: str, now: float, retries: Retries) -> None:
        """Reads one profile, checks its digest, and puts it into the library."""
        try:
            data = read_profile(version, self._folder, self._peers, self._retries, now)
            if not self._library.put(CalibrationProfile.from_bytes(data, version)):
                full = InvalidProfileError(f"no room for profile {version}: {MAX_PROFILES} are held")
                retries.failed(version, full, now)
                return
        except InvalidProfileError as error:
            self._counters.add("profiles_refused")
            retries.failed(version, error, now)
            return
        except FetchError as error:
            self._counters.add("profiles_missing" if error.status == 404 else "fetch_errors")
            retries.failed(version, error, now)
            if error.status == 404:
                # A client named a version that does not exist; if it is named again, it is looked for again.
                self._library.forget(version)
            return
        retries.succeeded(version)
        log.info("loaded profile %s", version)
        # The control process serves only profiles that engines have acknowledged.
        self._loaded()


def read_profile(version: str, folder: Path | None, peers: Peers, retries: Retries, now: float) -> bytes:
    """Returns the file of a profile: from the folder, else from an admin port. Raises FetchError, with status 404 if it
    is not found.

    retries: of the ports; one that does not answer is not asked while its pause lasts.
    """
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
    # Those that asked for it come first; if one fails, the next is tried.
    for peer in sorted(peers.all, key=lambda p: not p.wants(version)):
        operation = f"fetches from {peer.url}"
        if not retries.may_try(operation, now):
            failure = FetchError(f"{peer.url} did not answer a moment ago")
            continue
        try:
            data = peer.client.profile(version)
        except FetchError as error:
            if not error.status:
                retries.failed(operation, error, now)
            failure = error if error.status != 404 or failure.status == 404 else failure
        else:
            retries.succeeded(operation)
            return data
    raise failure
