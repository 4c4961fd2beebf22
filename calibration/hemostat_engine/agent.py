"""The background threads of one rank: one reports held profiles and sends taps, one fetches missing ones (`fetching`).

Decoding never waits for them. Every failure is counted, retried after a pause, and logged once until it changes. Each
call to an admin port has a thread of its own: one that does not answer delays nothing but what is meant for it.

There may be several admin ports: of one control process, which is active at one of its addresses, or of middlewares
that share the engine. All of them receive the report; versions that any of them asks for are held; a profile is fetched
from any that has it; taps go to the middleware that asked for them, which the prefix of the nonce names.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hemostat_calibration import __version__
from hemostat_engine.adapters.state import state as adapters
from hemostat_engine.admin_client import FetchError
from hemostat_engine.fetching import Fetcher
from hemostat_engine.library import Counters, Library
from hemostat_engine.peers import Peer, Peers
from hemostat_engine.retries import Retries
from hemostat_engine.secrets import Secrets
from hemostat_engine.settings import Settings
from hemostat_engine.taps import Taps
from hemostat_engine.weights import LoadedWeights

log = logging.getLogger("hemostat.engine")

TICK_SECONDS = 0.25
REPORT_SECONDS = 1.0
"""The time between two reports to an admin port."""
MAX_STEPS_PER_FLUSH = 256
MAX_BYTES_PER_FLUSH = 8 << 20
"""The largest number of bytes of features and distinct masks in one message. The step that reaches it is still sent;
the admin port accepts twice as much."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The identity of the rank that reports. boot_id: the same on all ranks of one engine, new with every start."""

    boot_id: str
    rank: int
    world_size: int
    vocab_size: int
    runner: str
    vllm: str
    answers: bool = False
    """It is True if the API server of this vLLM hands out answers (`answer_tap`)."""
    sets: bool = False
    """It is True if taps say which ids a grammar allows (`masks`)."""


def in_thread(run: Callable[[], None]) -> None:
    threading.Thread(target=run, name="hemostat-call", daemon=True).start()


class Agent:
    """Reports to the admin ports. Call `start()` once; threads then call `tick(now)` and `fetcher.tick(now)` four times
    a second.

    spawn: runs a call to an admin port, at once or in a thread.
    """

    def __init__(
        self,
        identity: Identity,
        settings: Settings,
        library: Library,
        counters: Counters,
        taps: Taps,
        clock: Callable[[], float] = time.monotonic,
        weights: LoadedWeights | None = None,
        spawn: Callable[[Callable[[], None]], None] = in_thread,
    ) -> None:
        self.identity = identity
        self._library = library
        self._counters = counters
        self._taps = taps
        self._has_source = settings.admin_url is not None or settings.profile_dir is not None
        self._peers = Peers(settings)
        self.secrets = Secrets(clock)
        self._retries = Retries()
        self.fetcher = Fetcher(settings.profile_dir, self._peers, library, counters, self.report_soon)
        self._spawn = spawn
        self._running: set[str] = set()
        """The labels of the calls that have not ended."""
        self._clock = clock
        self._weights = weights or LoadedWeights()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Starts the threads, if a source of profiles is configured."""
        if not self._has_source:
            log.warning("neither HEMOSTAT_ADMIN_URL nor HEMOSTAT_PROFILE_DIR is set: every request gets identity")
            return
        self._weights.start()
        for name, tick in (("hemostat-agent", self.tick), ("hemostat-fetch", self.fetcher.tick)):
            self._threads.append(threading.Thread(target=self._run, args=(tick,), name=name, daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        """Stops the threads. This is not needed at exit, since they are daemon threads."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def report_soon(self) -> None:
        """Makes the next report due at once, since what is held has changed."""
        for peer in self._peers.all:
            peer.next_report = 0.0

    def _run(self, tick: Callable[[float], None]) -> None:
        while not self._stop.wait(TICK_SECONDS):
            self._guarded(lambda: tick(self._clock()))

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception:
            # An unexpected error must not end the thread: no profile would arrive any more.
            self._counters.add("agent_errors")
            log.exception("hemostat agent")

    def tick(self, now: float) -> None:
        """Sends taps and a report: each if it is due and not paused after a failure."""
        if self._peers.is_due(now):
            self._call("resolve", lambda: self._peers.refresh(now))
        if self._peers.all and len(self._taps):
            self._send_taps(now)
        for peer in self._peers.all:
            if now >= peer.next_report and self._may_call("report", peer, now):
                peer.next_report = now + REPORT_SECONDS
                self._call(self._peers.label("report", peer), functools.partial(self._report, peer, now))

    def _may_call(self, operation: str, peer: Peer, now: float) -> bool:
        label = self._peers.label(operation, peer)
        return label not in self._running and self._retries.may_try(label, now)

    def _call(self, label: str, action: Callable[[], None]) -> None:
        """Spawns the action, unless the last one of this label has not ended."""
        if label in self._running:
            return
        self._running.add(label)

        def run() -> None:
            try:
                self._guarded(action)
            finally:
                self._running.discard(label)

        try:
            self._spawn(run)
        except RuntimeError:  # the limit of threads: the next tick tries again
            self._running.discard(label)
            raise

    def _report(self, peer: Peer, now: float) -> None:
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
            "plugin": __version__,
            "answers": identity.answers,
            "sets": identity.sets,
            **self._weights.report(),
            **adapters.report(),
        }
        operation = self._peers.label("report", peer)
        try:
            peer.last_response = peer.client.report(body)
            peer.answers = True
            self.secrets.update(peer.last_response.secrets)
        except FetchError as error:
            peer.answers = False
            self._counters.add("report_errors")
            self._retries.failed(operation, error, now)
            return
        self._retries.succeeded(operation)
        hold = self._peers.versions_to_hold()
        self._library.hold(hold)
        adapters.want(hold)

    def _send_taps(self, now: float) -> None:
        peers = [peer for peer in self._peers.all if self._may_call("tap", peer, now)]
        if not peers:
            # The taps stay in the queue, which drops and counts new ones when it is full.
            return
        runs = self._taps.drain(MAX_STEPS_PER_FLUSH, MAX_BYTES_PER_FLUSH)
        unsent_rows = sum(run["tokens"] for run in runs)
        for peer in peers:
            own_runs = [run for run in runs if self._peers.owns(peer, run["nonce"])]
            if not own_runs:
                continue
            rows = sum(run["tokens"] for run in own_runs)
            unsent_rows -= rows
            label = self._peers.label("tap", peer)
            self._call(label, functools.partial(self._send, peer, label, own_runs, rows, now))
        if unsent_rows:
            self._counters.add("taps_dropped", unsent_rows)

    def _send(self, peer: Peer, label: str, runs: list[dict[str, Any]], rows: int, now: float) -> None:
        try:
            peer.client.send_taps({"boot_id": self.identity.boot_id, "taps": runs})
        except FetchError as error:
            self._counters.add("taps_dropped", rows)
            self._retries.failed(label, error, now)
            return
        self._counters.add("taps_sent", rows)
        self._retries.succeeded(label)
