"""The background thread of one rank: reports held profiles, fetches missing ones, sends taps.

Decoding never waits for this thread. Every failure is counted, retried after a pause, and logged once until it changes.

Several replicas of Hemostat have an admin port each. All of them receive the report; versions that any of them asks for
are held, those of the leading replica first; a profile is fetched from any replica that has it; taps go to the replica
that asked for them, which the prefix of the nonce names.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from hemostat_engine.adapters.state import state as adapters
from hemostat_engine.admin_client import FetchError
from hemostat_engine.fetching import Fetcher
from hemostat_engine.library import Counters, Library
from hemostat_engine.peers import Peer, Peers
from hemostat_engine.retries import Retries
from hemostat_engine.settings import Settings
from hemostat_engine.taps import Taps
from hemostat_engine.weights import LoadedWeights

log = logging.getLogger("hemostat.engine")

TICK_SECONDS = 0.25
REPORT_SECONDS = 1.0
"""Between two reports to a replica."""
MAX_STEPS_PER_FLUSH = 256
MAX_FEATURE_BYTES_PER_FLUSH = 8 << 20
"""The step that reaches it is still sent; the admin port accepts twice as much."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who reports. boot_id: the same on all ranks of one engine, new with every start."""

    boot_id: str
    rank: int
    world_size: int
    vocab_size: int
    runner: str
    vllm: str
    answers: bool = False
    """The API server of this vLLM hands out answers (`answers`)."""


class Agent:
    """`start()` once; the thread then calls `tick(now)` four times a second."""

    def __init__(
        self,
        identity: Identity,
        settings: Settings,
        library: Library,
        counters: Counters,
        taps: Taps,
        clock: Callable[[], float] = time.monotonic,
        weights: LoadedWeights | None = None,
    ) -> None:
        self.identity = identity
        self._library = library
        self._counters = counters
        self._taps = taps
        self._has_source = settings.admin_url is not None or settings.profile_dir is not None
        self._peers = Peers(settings)
        self._retries = Retries()
        self._fetcher = Fetcher(settings.profile_dir, self._peers, library, counters, self._retries)
        self._clock = clock
        self._weights = weights or LoadedWeights()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, if a source of profiles is configured."""
        if not self._has_source:
            log.warning("neither HEMOSTAT_ADMIN_URL nor HEMOSTAT_PROFILE_DIR is set: every request gets identity")
            return
        self._weights.start()
        self._thread = threading.Thread(target=self._run, name="hemostat-agent", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread. Not needed at exit: it is a daemon thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(TICK_SECONDS):
            try:
                self.tick(self._clock())
            except Exception:
                # An unexpected error in one tick must not end the thread: no profile would arrive any more.
                self._counters.add("agent_errors")
                log.exception("hemostat agent")

    def tick(self, now: float) -> None:
        """Send taps, scan the folder, report and fetch: each if it is due and not paused after a failure."""
        self._peers.refresh(now)
        if self._peers.all and len(self._taps):
            self._send_taps(now)
        self._fetcher.scan(now)
        for peer in self._peers.all:
            if now >= peer.next_report and self._retries.may_try(self._peers.label("report", peer), now):
                self._report(peer, now)
        self._fetcher.fetch_missing(now)

    def _report(self, peer: Peer, now: float) -> None:
        peer.next_report = now + REPORT_SECONDS
        identity = self.identity
        body = {
            "boot_id": identity.boot_id,
            "rank": identity.rank,
            "world_size": identity.world_size,
            "versions": self._library.versions(),
            "vocab_size": identity.vocab_size,
            "counters": self._counters.read() | adapters.counters(),
            "runner": identity.runner,
            "vllm": identity.vllm,
            "answers": identity.answers,
            **self._weights.report(),
            **adapters.report(),
        }
        operation = self._peers.label("report", peer)
        try:
            peer.last_response = peer.client.report(body)
        except FetchError as error:
            peer.report_failed()
            self._counters.add("report_errors")
            self._retries.failed(operation, error, now)
            return
        self._retries.succeeded(operation)
        hold = self._peers.versions_to_hold()
        self._library.hold(hold)
        adapters.want(hold)

    def _send_taps(self, now: float) -> None:
        peers = [peer for peer in self._peers.all if self._retries.may_try(self._peers.label("tap", peer), now)]
        if not peers:
            # The taps stay in the queue, which drops and counts new ones when it is full.
            return
        runs = self._taps.drain(MAX_STEPS_PER_FLUSH, MAX_FEATURE_BYTES_PER_FLUSH)
        unsent_rows = sum(run["tokens"] for run in runs)
        for peer in peers:
            own_runs = [run for run in runs if self._peers.owns(peer, run["nonce"])]
            if not own_runs:
                continue
            operation = self._peers.label("tap", peer)
            try:
                peer.client.send_taps({"boot_id": self.identity.boot_id, "taps": own_runs})
            except FetchError as error:
                self._retries.failed(operation, error, now)
                continue
            rows = sum(run["tokens"] for run in own_runs)
            unsent_rows -= rows
            self._counters.add("taps_sent", rows)
            self._retries.succeeded(operation)
        if unsent_rows:
            self._counters.add("taps_dropped", unsent_rows)
