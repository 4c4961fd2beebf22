"""A relay's end of its connection to the control process. The relay goes on serving whatever happens to it."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
import ssl
import time
from collections.abc import Callable
from typing import cast

from hemostat.ipc.addresses import ControlAddresses, Target, connect
from hemostat.ipc.messages import (
    MAX_MESSAGE_BYTES,
    PROTOCOL,
    Alive,
    Capture,
    Hello,
    Message,
    MessageReader,
    OutcomeReport,
    OutcomeReports,
    Policy,
    Refused,
    Stats,
    encode,
)
from hemostat.ipc.sampled import SampledTally
from hemostat.ipc.supervised import is_compiled
from hemostat_calibration.backoff import Backoff

log = logging.getLogger("hemostat.relay")

MAX_QUEUED_BYTES = 16 * 1024 * 1024
"""The largest number of bytes that may be queued for the control process; beyond that captures are dropped."""
MAX_QUEUED_REPORTS = 1024
"""The largest number of reports of outcomes that wait for the next message."""
REPORTS_PER_MESSAGE = 64
"""The number of reports that are sent at once; fewer are sent with the next figures."""
STATS_SECONDS = 1.0
HOT_MODULE = "hemostat.relay.exchange"
"""A name only, for this layer cannot import it: all modules of the hot path are compiled, or none."""
RECONNECT_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0)
"""The longest pauses between attempts to connect, each of them at every address."""
ATTEMPT_SECONDS = 5.0
"""The longest time for one address, from the look-up or the connection to the first answer."""
SILENCE_SECONDS = 10.0
"""The time without a message after which the control process counts as gone: it says every two seconds that it is
there."""
POLICY_SECONDS = 30.0
"""The time after the last word of the control process for which its last policy is in force. A restart of that process
then changes no request's arm.
"""

MAX_LINES = 16
"""The largest number of different lines of the log, until the control process is found again."""
PROCESS = secrets.token_hex(8)
"""The name of this process among all relays."""


class LastPolicy:
    """Owns the policy in force: the last one, until nothing was heard of the control process for POLICY_SECONDS.

    A policy that has expired never comes back into force. Only one that is received afterwards acts: in the meantime
    the control process may have rolled back or forgotten what the old one names.

    on_policy: called with each policy, and with None when it is not in force any more. clock: monotonic seconds.
    """

    def __init__(self, on_policy: Callable[[Policy | None], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._on_policy = on_policy
        self._clock = clock
        self._in_force = False
        self.heard_at = clock()
        self.expired = 0
        """The number of policies that have expired."""

    def heard(self, policy: Policy | None = None) -> None:
        """Notes that the control process has said something. policy: the one that it sent; None: the one in force stays
        so."""
        self.look()
        self.heard_at = self._clock()
        if policy is not None:
            self._in_force = True
            self._on_policy(policy)

    def look(self) -> None:
        """Ends the policy if it has expired. To be called every second."""
        if self._in_force and self._clock() - self.heard_at >= POLICY_SECONDS:
            self._in_force = False
            self.expired += 1
            self._on_policy(None)


class ControlLink:
    """Keeps a connection to the active control process, and finds it again when it breaks.

    on_policy: see `LastPolicy`. stats: the figures to report, once a second. quiet: nothing is logged.
    """

    def __init__(
        self,
        addresses: ControlAddresses,
        worker: int,
        on_policy: Callable[[Policy | None], None],
        stats: Callable[[], Stats],
        clock: Callable[[], float] = time.monotonic,
        *,
        quiet: bool = False,
    ) -> None:
        self._quiet = quiet
        self._addresses = addresses
        self._context = addresses.context()
        self._worker = worker
        self._policy = LastPolicy(on_policy, clock)
        self._clock = clock
        self._stats = stats
        self._used: _Connection | None = None
        """The connection that the control process has answered on."""
        self._reports: list[OutcomeReport] = []
        self.sampled = SampledTally()
        """The counts of this relay's sampled requests; they are sent with the figures."""
        self._said: set[str] = set()
        """The lines of the log since the control process was last found: each is written once."""

    @property
    def _transport(self) -> asyncio.WriteTransport | None:
        return None if self._used is None else self._used.transport

    def emit(self, capture: Capture) -> bool:
        """Queues a capture; returns False if it is dropped, because there is no control process, too much is queued, or
        it is too large."""
        transport = self._transport
        if transport is None or transport.get_write_buffer_size() > MAX_QUEUED_BYTES:
            return False
        frame = encode(capture)
        if len(frame) > MAX_MESSAGE_BYTES:
            return False
        transport.write(frame)
        return True

    def report_outcome(self, report: OutcomeReport) -> bool:
        """Queues a report; returns False if it is dropped, which does not depend on what it says."""
        if self._transport is None or len(self._reports) >= MAX_QUEUED_REPORTS:
            return False
        self._reports.append(report)
        if len(self._reports) >= REPORTS_PER_MESSAGE:
            self._send_reports()
        return True

    def _send_reports(self) -> None:
        transport = self._transport
        if self._reports and transport is not None and transport.get_write_buffer_size() <= MAX_QUEUED_BYTES:
            transport.write(encode(OutcomeReports(self._reports)))
            self._reports = []

    def report(self) -> None:
        """Sends the figures now, and the reports of outcomes that wait."""
        transport = self._transport
        if transport is not None and transport.get_write_buffer_size() <= MAX_QUEUED_BYTES:
            transport.write(encode(self._stats()))
            if (sampled := self.sampled.take()) is not None:
                transport.write(encode(sampled))
        self._send_reports()

    async def run(self) -> None:
        """Keeps a connection to a control process until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._look())
            tasks.create_task(self._connect())

    async def _look(self) -> None:
        while True:
            self._policy.look()
            await asyncio.sleep(STATS_SECONDS)

    async def _connect(self) -> None:
        backoff = Backoff(RECONNECT_SECONDS, random.random)
        while True:
            failures = await self._try_all()
            if failures is None:
                backoff.reset()
            elif not self._said:
                self._say(f"no control process ({failures}); requests are forwarded without it")
            await asyncio.sleep(backoff.pause())

    async def _try_all(self) -> str | None:
        """Connects to one address after the other. Returns None once a connection was in use and has ended; else why
        none could be used."""
        try:
            async with asyncio.timeout(ATTEMPT_SECONDS):
                targets, failures = await self._addresses.targets()
        except TimeoutError:
            return f"no answer to the look-up of its name within {ATTEMPT_SECONDS:g} s"
        for target in targets:
            try:
                connection = await self._answered(target)
            except (OSError, _RefusedError) as error:
                why = _in_words(error)
                failures.append(f"{target}: {why}")
                if isinstance(error, ssl.SSLCertVerificationError) or (
                    isinstance(error, _RefusedError) and error.fault
                ):
                    self._say(f"the control process at {target} cannot be used: {why}")
            else:
                await self._use(connection, target)
                return None
        return "; ".join(failures)

    async def probe(self) -> tuple[dict[str, str], list[str]]:
        """Asks every address once, and returns why its control process does not take this relay, "" if it does; and
        which names are not known, and why."""
        targets, failures = await self._addresses.targets()
        result = {}
        for target in targets:
            try:
                (await self._answered(target)).abort()
                result[str(target)] = ""
            except (OSError, _RefusedError) as error:
                result[str(target)] = _in_words(error)
        return result, failures

    async def _answered(self, target: Target) -> _Connection:
        """Returns a connection to a control process that takes this relay. Raises OSError or _RefusedError."""
        connection = _Connection(self._hello(), self._policy.heard)
        try:
            async with asyncio.timeout(ATTEMPT_SECONDS):
                await connect(target, lambda: connection, self._context)
                await connection.answered
        except BaseException:
            connection.abort()
            raise
        return connection

    async def _use(self, connection: _Connection, target: Target) -> None:
        """Uses a connection until it is lost."""
        if not self._quiet:
            log.info("relay %d: found the control process at %s", self._worker, target)
        self._said.clear()
        self._used = connection
        expired, why = self._policy.expired, ""
        while not connection.lost.done():
            self.report()
            await asyncio.wait((connection.lost,), timeout=STATS_SECONDS)
            if connection.lost.done():
                break
            if self._clock() - self._policy.heard_at > SILENCE_SECONDS:
                why = f"silent for {SILENCE_SECONDS:g} s"
            elif self._policy.expired != expired:
                # This process was stopped, for example. The policy is sent to those that connect.
                why = f"its policy expired, {POLICY_SECONDS:g} s after its last message"
            if why:
                connection.abort()
                break
        self._used = None
        why = why or connection.lost.result()
        self._say(
            f"lost the control process at {target} ({why}); requests are forwarded, and for at most "
            f"{POLICY_SECONDS:g} s go on being treated by its last policy"
        )

    def _say(self, text: str) -> None:
        if text not in self._said and len(self._said) < MAX_LINES and not self._quiet:
            self._said.add(text)
            log.warning("relay %d: %s", self._worker, text)

    def _hello(self) -> Hello:
        return Hello(
            protocol=PROTOCOL,
            token=self._addresses.token,
            process=PROCESS,
            pid=os.getpid(),
            worker=self._worker,
            compiled=is_compiled(HOT_MODULE),
            upstreams=list(self._addresses.upstreams),
        )

    async def close(self, timeout: float = 1.0) -> None:  # noqa: ASYNC109  a limit, not a cancellation
        """Sends the figures once more, and waits until what is queued has been sent."""
        connection = self._used
        if connection is None or connection.transport is None:
            return
        self.report()
        connection.transport.close()
        await asyncio.wait((connection.lost,), timeout=timeout)


class _RefusedError(Exception):
    """The text is the control process's. fault: the configuration has to be corrected."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.why)
        self.fault = refused.fault


class _Connection(asyncio.Protocol):
    """One connection to a control process. answered: done once the control process takes the relay, or failed with
    OSError or _RefusedError. lost: why it has ended.
    """

    def __init__(self, hello: Hello, heard: Callable[[Policy | None], None]) -> None:
        loop = asyncio.get_running_loop()
        self._hello = hello
        self._heard = heard
        self._frames = MessageReader()
        self.transport: asyncio.Transport | None = None
        self.answered: asyncio.Future[None] = loop.create_future()
        self.lost: asyncio.Future[str] = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.write(encode(self._hello))

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._frames.feed(data):
                self._receive(message)
        except ValueError as error:  # msgspec.DecodeError is one
            self._end(f"it sent an invalid message: {error}")
            self.abort()

    def _receive(self, message: Message) -> None:
        if isinstance(message, Refused):
            if not self.answered.done():
                self.answered.set_exception(_RefusedError(message))
            self._end(message.why)
        elif isinstance(message, Policy | Alive):
            if not self.answered.done():
                self.answered.set_result(None)
            self._heard(message if isinstance(message, Policy) else None)

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end("it closed the connection" if exc is None else _in_words(exc))

    def _end(self, why: str) -> None:
        if not self.lost.done():
            self.lost.set_result(why)
        if not self.answered.done():
            self.answered.set_exception(OSError(why))
            self.answered.exception()  # it may have no waiter


def _in_words(error: Exception) -> str:
    match error:
        case ssl.SSLCertVerificationError():
            return error.verify_message
        case ssl.SSLError():
            return f"TLS failed ({error.reason})"
        case TimeoutError():
            return f"no answer within {ATTEMPT_SECONDS:g} s"
        case OSError():
            return error.strerror or str(error)
    return str(error)
