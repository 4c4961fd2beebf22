"""The queue of recorded answers, and the thread that sends them from the API server's process to the admin ports."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from hemostat_engine.admin_client import FetchError
from hemostat_engine.passive import Lost, PassiveSampler
from hemostat_engine.peers import Peer, Peers
from hemostat_engine.secrets import Secrets

log = logging.getLogger("vllm.hemostat")

MAX_QUEUE_BYTES = 64 << 20
MAX_QUEUED_ANSWERS = 1 << 14
MAX_MESSAGE_BYTES = 8 << 20
MAX_MESSAGE_ANSWERS = 4096
"""The admin port refuses a message with more."""
ATTEMPTS = 2
COLLECT_SECONDS = 0.2
"""The time from the first answer in an empty queue to the message: a message of many answers costs hardly more than a
message of one.
"""
LOOK_SECONDS = 2.0
"""The time between two questions for the secrets and the policy, once secrets are known."""
PAUSE_SECONDS = 0.5
"""The time between two attempts. Hemostat waits some seconds for an answer, so one that is late is of no use."""


class Answer(Protocol):
    """The part of `hemostat_engine.answer_tap.RecordedAnswer` that is used here."""

    @property
    def bytes(self) -> int:
        """The bytes of the message's arrays."""
        ...

    def message(self) -> dict[str, Any]:
        """Returns the message. Raises ValueError if it cannot be made."""
        ...


class AnswerQueue:
    """A bounded queue of finished answers, between the server's event loop and the sender's thread.

    count of `dropped` answers: there was no room, they could not be recorded, or not be sent.
    """

    def __init__(self, max_bytes: int = MAX_QUEUE_BYTES) -> None:
        self._answers: deque[Answer] = deque()
        self._max_bytes = max_bytes
        self.bytes = 0
        """The bytes of the answers that are queued."""
        self._lock = threading.Lock()
        self.dropped = 0
        self.filled = threading.Event()
        self._checksums: dict[str, Any] | None = None

    def push_checksums(self, message: dict[str, Any]) -> None:
        """Queues a message of `checksums.measure`, in the place of one that was not sent yet."""
        with self._lock:
            self._checksums = message
        self.filled.set()

    def take_checksums(self) -> dict[str, Any] | None:
        """Removes and returns the message of `push_checksums`; None if there is none."""
        with self._lock:
            message, self._checksums = self._checksums, None
            return message

    def push(self, answer: Answer) -> bool:
        """Queues an answer; returns False if there is no room, and counts that."""
        with self._lock:
            if self.bytes + answer.bytes > self._max_bytes or len(self._answers) >= MAX_QUEUED_ANSWERS:
                self.dropped += 1
                return False
            self.bytes += answer.bytes
            self._answers.append(answer)
        self.filled.set()
        return True

    def has_room(self) -> bool:
        """Returns False while the queue is half full: requests are not sampled then."""
        return 2 * self.bytes < self._max_bytes and 2 * len(self._answers) < MAX_QUEUED_ANSWERS

    def take(self, max_bytes: int, max_answers: int) -> list[dict[str, Any]]:
        """Returns the messages of the oldest answers: of one, and of as many more as stay within both bounds.

        One that cannot be made is dropped and counted.
        """
        taken: list[Answer] = []
        size = 0
        with self._lock:
            while (
                self._answers and len(taken) < max_answers and (not taken or size + self._answers[0].bytes <= max_bytes)
            ):
                taken.append(self._answers.popleft())
                size += taken[-1].bytes
            self.bytes -= size
            if not self._answers:
                self.filled.clear()
        messages = []
        for answer in taken:
            try:
                messages.append(answer.message())
            except ValueError as error:
                self.drop()
                log.warning("an answer was not recorded: %s", error)
        return messages

    def drop(self, answers: int = 1) -> None:
        """Counts answers that are lost."""
        with self._lock:
            self.dropped += answers


class AnswerSender:
    """Sends the answers in the queue. Call `start()` once; a thread then sends them. boot_id: the id of this
    process.
    """

    def __init__(
        self,
        queue: AnswerQueue,
        peers: Peers,
        boot_id: str,
        secrets: Secrets,
        sampler: PassiveSampler | None = None,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._sampler = sampler or PassiveSampler(secrets)
        self._queue = queue
        self._peers = peers
        self._boot_id = boot_id
        self._secrets = secrets
        self._clock = clock
        self._pause = pause
        self._prefixes: dict[str, str] = {}
        """The prefix of the nonces of each middleware's requests, by the address of its admin port."""
        self._failing = False

    def start(self) -> None:
        threading.Thread(target=self._run, name="hemostat-answers", daemon=True).start()

    def _run(self) -> None:
        next_look = 0.0
        while True:
            try:
                if self._clock() >= next_look:
                    self.look()
                    next_look = self._clock() + (LOOK_SECONDS if self._secrets.believed() else PAUSE_SECONDS)
                if self._queue.filled.wait(max(0.0, next_look - self._clock())):
                    self._pause(COLLECT_SECONDS)
                    self.send()
            except Exception:
                # An unexpected error must not end the thread: no answer would be sent any more.
                log.exception("hemostat answers")
                self._pause(PAUSE_SECONDS)

    def look(self) -> None:
        """Asks the admin ports for their secrets and policies, by messages without answers."""
        self._peers.refresh(self._clock())
        for peer in self._peers.all:
            with contextlib.suppress(FetchError):
                self._deliver(peer, [])

    def send(self) -> None:
        """Sends one message's worth of answers, or drops and counts them."""
        checksums = self._queue.take_checksums()
        unsent = self._queue.take(MAX_MESSAGE_BYTES, MAX_MESSAGE_ANSWERS)
        if checksums is not None:
            self._send_checksums(checksums)
        for attempt in range(ATTEMPTS):
            if attempt:
                self._pause(PAUSE_SECONDS)
            unsent = self._send_once(unsent)
            if not unsent:
                return
        self._queue.drop(len(unsent))
        self._sampler.lost(Lost.LINK_FULL, sum("request" in answer for answer in unsent))

    def _send_once(self, answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns the answers that no admin port has accepted."""
        self._peers.refresh(self._clock())
        unsent = answers
        for peer in self._peers.all:
            own = [answer for answer in unsent if self._may_own(peer, answer["nonce"])]
            if not own:
                continue
            try:
                self._deliver(peer, own)
            except FetchError as error:
                self._log_failure(error)
                continue
            self._failing = False
            # A middleware ignores answers that are not of its own requests.
            unsent = [answer for answer in unsent if not self._may_own(peer, answer["nonce"])]
        return unsent

    def _send_checksums(self, message: dict[str, Any]) -> None:
        """Sends checksums to the admin port that has asked for them, once: it asks again if they do not come."""
        self._peers.refresh(self._clock())
        for peer in self._peers.all:
            if self._may_own(peer, message["nonce"]):
                try:
                    self._deliver(peer, [], message)
                except FetchError as error:
                    self._log_failure(error)

    def _deliver(self, peer: Peer, answers: list[dict[str, Any]], checksums: dict[str, Any] | None = None) -> None:
        dropped, counts = self._queue.dropped, self._sampler.counts()
        body = {"boot_id": self._boot_id, "answers": answers, "dropped": dropped, "passive": counts}
        if checksums is not None:
            body["checksums"] = checksums
        response = peer.client.send_answers(body)
        self._sampler.heard(peer.url, response.passive, response.nonce_prefix)
        self._prefixes[peer.url] = response.nonce_prefix
        self._secrets.update(response.secrets)
        self._sampler.handed_on(sum("request" in answer for answer in answers))

    def _may_own(self, peer: Peer, nonce: str) -> bool:
        """Returns True if the request came through `peer`, or if it may have, while the prefix of `peer` is not
        known.
        """
        if len(self._peers.all) == 1:
            return True
        prefix = self._prefixes.get(peer.url)
        return not prefix or nonce.startswith(f"{prefix}-")

    def _log_failure(self, error: FetchError) -> None:
        if not self._failing:
            log.warning("answers cannot be sent: %s", error)
        self._failing = True
