"""Relays on other machines: TCP with TLS, what is refused and why, and what a peer without the token can cost."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.support.captures import sized_capture
from tests.support.certificates import Certificate, certificate
from tests.support.loops import looping
from tests.support.relay_listener import hello
from tests.support.waiting import HANG_SECONDS, until
from tests.support.wire import policy

from hemostat.ipc import control_end, relay_end, relay_listener
from hemostat.ipc.addresses import ControlAddresses, client_context, server_context
from hemostat.ipc.control_end import RelayLink
from hemostat.ipc.framing import frame, read_frame
from hemostat.ipc.messages import (
    MAX_HELLO_BYTES,
    PROTOCOL,
    Alive,
    Capture,
    Hello,
    Message,
    MessageReader,
    Policy,
    Refused,
    Stats,
    encode,
)
from hemostat.ipc.relay_end import MAX_QUEUED_BYTES, POLICY_SECONDS, ControlLink, LastPolicy
from hemostat.ipc.relay_listener import MAX_HANDSHAKES, RelayListener, Security

TOKEN = "a-relay-token"
ENGINE = "http://127.0.0.1:8000"
STATS = Stats(counters={}, overhead_buckets=[1], overhead_sum=0.5, ready=True)


class End:
    """A control process's end at a port of this machine. link: of the active one."""

    def __init__(self, made: Certificate | None) -> None:
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.sock.getsockname()[1]
        context = server_context(made.cert, made.key) if made is not None else None
        self.listener = RelayListener([self.sock], Security(TOKEN, context, {ENGINE}))
        self.captures: list[Capture] = []
        self.link = RelayLink()
        self.link.on_capture = self.captures.append
        self.link.set_policy(policy())

    def addresses(self, made: Certificate | None, host: str = "localhost") -> ControlAddresses:
        ca = str(made.cert) if made is not None else None
        return ControlAddresses(hosts=[(host, self.port)], token=TOKEN, ca=ca, upstreams=[ENGINE])


@asynccontextmanager
async def end(made: Certificate | None = None, *, active: bool = True) -> AsyncIterator[End]:
    listening = End(made)
    if active:
        listening.listener.admit = listening.link.serve
    listening.listener.start()
    try:
        async with looping(listening.link.run()):
            yield listening
    finally:
        await listening.listener.close()


class Relay:
    def __init__(self, addresses: ControlAddresses, clock: Callable[[], float] | None = None) -> None:
        self.policies: list[Policy | None] = []
        more = {} if clock is None else {"clock": clock}
        self.link = ControlLink(addresses, 0, self.policies.append, lambda: STATS, **more)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        try:
            async with looping(self.link.run()):
                yield
        finally:
            await self.link.close()


async def said(port: int, first: bytes, context: ssl.SSLContext | None = None) -> list[Message]:
    """What a peer is told that sends this, until the connection is closed."""
    host = "localhost" if context is not None else None
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=host)
    try:
        writer.write(first)
        return MessageReader().feed(await asyncio.wait_for(reader.read(), HANG_SECONDS))
    except ConnectionResetError:  # closed before it had read all: nothing was said
        return []
    finally:
        writer.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return certificate(tmp_path_factory.mktemp("certificate"))


def known(**more: object) -> Hello:
    return msgspec.structs.replace(hello("p"), **({"token": TOKEN, "upstreams": [ENGINE]} | more))


# --- one relay and one control process --------------------------------------------------------------------------------


@pytest.mark.parametrize("tls", [True, False])
async def test_captures_figures_and_policies_by_tcp(made: Certificate, tls: bool) -> None:
    used = made if tls else None
    async with end(used) as listening:
        relay = Relay(listening.addresses(used))
        async with relay.running():
            await until(lambda: relay.policies == [policy()] and listening.link.ready)
            assert relay.link.emit(sized_capture("far away", size=1_000_000))
            await until(lambda: [capture.request_id for capture in listening.captures] == ["far away"])
            listening.link.set_policy(policy(generation=9))
            await until(lambda: relay.policies == [policy(), policy(generation=9)])


async def test_captures_are_dropped_while_the_link_is_full_with_tls(made: Certificate) -> None:
    """The bytes that TLS holds back count, too."""
    async with end(made) as listening:
        hold = asyncio.Event()

        async def admit(_: Hello, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(encode(Alive()))
            await hold.wait()

        listening.listener.admit = admit
        relay = Relay(listening.addresses(made))
        async with relay.running():
            size = 1 << 20
            await until(lambda: relay.link.emit(sized_capture(size=size)))
            accepted = 1
            while relay.link.emit(sized_capture(size=size)):
                accepted += 1
                assert accepted * size < 4 * MAX_QUEUED_BYTES, "it is bounded"
                await asyncio.sleep(0)
            assert accepted * size >= MAX_QUEUED_BYTES / 2
            hold.set()


async def test_a_certificate_of_another_authority_is_not_trusted(
    made: Certificate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with end(certificate(tmp_path)) as listening:
        relay = Relay(listening.addresses(made))
        async with relay.running():
            await until(lambda: "relay 0: the control process at 127.0.0.1" in caplog.text)
    assert "cannot be used: self-signed certificate" in caplog.text
    assert relay.policies == []


async def test_a_certificate_has_to_name_the_host(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = certificate(tmp_path, "control.example")
    async with end(other) as listening:
        relay = Relay(listening.addresses(other))
        async with relay.running():
            await until(lambda: "Hostname mismatch" in caplog.text)
    assert relay.policies == []


async def test_a_peer_without_tls_is_refused_where_there_is_tls(made: Certificate) -> None:
    async with end(made) as listening:
        assert await said(listening.port, encode(known())) == []
        relay = Relay(replace(listening.addresses(made), ca=None))
        async with relay.running():
            assert await said(listening.port, encode(known(token="x")), client_context(made.cert)), "the port answers"
        assert listening.link.relays == 0
        assert relay.policies == []


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "why", "fault"),
    [
        (known(protocol=PROTOCOL + 1), f"protocol {PROTOCOL + 1}, the control process {PROTOCOL}", True),
        (known(protocol=PROTOCOL + 1, token="x"), "run the same version", True),
        (known(token="another"), "wrong token; control.token", True),
        (known(token=""), "wrong token", True),
        (known(upstreams=[ENGINE, "http://b:1"]), "upstream http://b:1 is not one of", True),
    ],
)
async def test_refusals_are_a_line_at_both_ends(
    first: Hello, why: str, fault: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with end() as listening:
        for _ in range(3):
            (refused,) = await said(listening.port, encode(first))
            assert isinstance(refused, Refused)
            assert why in refused.why
            assert "\n" not in refused.why
            assert refused.fault is fault
        lines = [record.message for record in caplog.records if record.name == "hemostat.control"]
        assert lines == [f"a relay from 127.0.0.1 is refused: {refused.why}"], "once, however often it comes"
        assert listening.link.relays == 0


async def test_the_hello_of_any_other_version_is_read_as_far_as_its_protocol() -> None:
    async with end() as listening:
        body = msgspec.msgpack.encode({"type": "hello", "protocol": 7, "token": ["of", "another", "form"], "new": {}})
        (refused,) = await said(listening.port, frame(body))
        assert isinstance(refused, Refused)
        assert "protocol 7" in refused.why


async def test_a_standby_refuses_until_it_is_active(caplog: pytest.LogCaptureFixture) -> None:
    async with end(active=False) as listening:
        assert await said(listening.port, encode(known())) == [Refused("not active", fault=False)]
        relay = Relay(listening.addresses(None))
        async with relay.running():
            await until(lambda: "relay 0: no control process (127.0.0.1" in caplog.text)
            listening.listener.admit = listening.link.serve
            await until(lambda: relay.policies == [policy()])
    warnings = [record.message.partition(" (")[0] for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == ["relay 0: no control process"]


async def test_a_relay_says_once_why_it_is_refused(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0
    connect = relay_end.connect

    async def counted(*given: Any) -> None:
        nonlocal tries
        tries += 1
        await connect(*given)

    monkeypatch.setattr(relay_end, "connect", counted)
    async with end() as listening:
        relay = Relay(replace(listening.addresses(None), token="old"))
        async with relay.running():
            await until(lambda: tries >= 4)  # it begins after three refusals
    lines = [record.message for record in caplog.records if record.name == "hemostat.relay"]
    at = f"127.0.0.1:{listening.port}"
    why = "wrong token; control.token has to be the same on both sides"
    assert lines == [f"relay 0: the control process at {at} cannot be used: {why}"]


# --- which control process --------------------------------------------------------------------------------------------


async def test_a_relay_tries_every_address_and_finds_the_active_one_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        gone = nobody.getsockname()[1]
    async with end(active=False) as second, end() as first:
        hosts = [("no-such-host.invalid", 1), ("localhost", gone), ("localhost", second.port)]
        addresses = replace(first.addresses(None), hosts=[*hosts, ("127.0.0.1", first.port)])
        relay = Relay(addresses)
        async with relay.running():
            await until(lambda: first.link.reporting == 1)
            await first.listener.close()
            second.listener.admit = second.link.serve
            await until(lambda: second.link.reporting == 1)
    lines = [record.message.partition(" (")[0] for record in caplog.records if record.name == "hemostat.relay"]
    at = [f"127.0.0.1:{listener.port}" for listener in (first, second)]
    result = [f"relay 0: found the control process at {address}" for address in at]
    ours = [line for line in lines if not line.startswith("relay 0: no control process")]
    assert ours == [result[0], f"relay 0: lost the control process at {at[0]}", result[1]]
    assert relay.policies[0] == policy()
    assert None not in relay.policies, "no request has changed its arm"


async def test_a_control_process_that_is_not_active_any_more_dismisses_its_relays() -> None:
    async with end() as first, end(active=False) as second:
        addresses = first.addresses(None)
        relay = Relay(replace(addresses, hosts=[*addresses.hosts, ("127.0.0.1", second.port)]))
        async with relay.running():
            await until(lambda: first.link.reporting == 1)
            first.listener.dismiss()
            await until(lambda: first.link.relays == 0)
            second.listener.admit = second.link.serve
            await until(lambda: second.link.reporting == 1)
        assert first.link.relays == 0
        assert None not in relay.policies


async def test_a_control_process_that_is_silent_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped (SIGSTOP) it keeps its connections: the kernel still takes what is sent."""
    monkeypatch.setattr(relay_end, "SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(relay_end, "STATS_SECONDS", 0.05)
    async with end() as listening:
        hold, stopped_in_use = asyncio.Event(), asyncio.Event()

        async def stopped(_: Hello, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(encode(Alive()))
            await read_frame(reader)  # a relay sends its figures once it uses the connection
            stopped_in_use.set()
            await hold.wait()

        listening.listener.admit = stopped
        relay = Relay(listening.addresses(None))
        async with relay.running():
            await asyncio.wait_for(stopped_in_use.wait(), HANG_SECONDS)
            listening.listener.admit = listening.link.serve
            await until(lambda: relay.policies == [policy()])
        hold.set()


async def test_a_control_process_that_does_not_answer_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_end, "ATTEMPT_SECONDS", 0.2)
    async with end() as listening:
        with socket.create_server(("127.0.0.1", 0)) as mute:
            hosts = [("127.0.0.1", mute.getsockname()[1]), ("127.0.0.1", listening.port)]
            relay = Relay(replace(listening.addresses(None), hosts=hosts))
            async with relay.running():
                await until(lambda: relay.policies == [policy()])


async def test_a_relay_that_is_silent_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_end, "SILENCE_SECONDS", 0.1)
    async with end() as listening:
        reader, writer = await asyncio.open_connection("127.0.0.1", listening.port)
        writer.write(encode(known()))
        await asyncio.wait_for(reader.read(), HANG_SECONDS)
        writer.close()
        assert listening.link.relays == 0


# --- the last policy --------------------------------------------------------------------------------------------------


def test_the_last_policy_is_in_force_for_30_seconds_after_the_last_word() -> None:
    now, given = 1000.0, list[Policy | None]()
    last = LastPolicy(given.append, lambda: now)
    last.look()
    last.heard()
    assert given == [], "there is no policy yet"
    last.heard(policy())
    for passed in (29.0, 29.9):
        now = 1000.0 + passed
        last.look()
    last.heard()
    assert given == [policy()], "what is in force is not given again"
    now += POLICY_SECONDS - 0.1
    last.look()
    assert given == [policy()]
    now += 0.1
    last.look()
    last.look()
    assert given == [policy(), None]
    last.heard()
    now += 7200.0
    last.heard()
    last.look()
    assert given == [policy(), None], "a policy that has expired is not revived by the word of a new control process"
    last.heard(policy(generation=2))
    last.heard()
    assert given[2:] == [policy(generation=2)]


def test_a_policy_expires_also_where_the_next_word_comes_before_anybody_looked() -> None:
    """Simulates a relay that was stopped for hours."""
    now, given = 1000.0, list[Policy | None]()
    last = LastPolicy(given.append, lambda: now)
    last.heard(policy())
    now += POLICY_SECONDS
    last.heard()
    assert given == [policy(), None]
    now += POLICY_SECONDS
    last.heard(policy(generation=2))
    assert given == [policy(), None, policy(generation=2)]


class Clock:
    """The relay's monotonic clock, which a test sets."""

    now = 5.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def with_policy(
    monkeypatch: pytest.MonkeyPatch, looks_every: float = 0.01
) -> AsyncIterator[tuple[End, Relay, Clock]]:
    """A relay that looks at its clock so often and has the first policy of its control process, which says all the time
    that it is there."""
    monkeypatch.setattr(relay_end, "STATS_SECONDS", looks_every)
    monkeypatch.setattr(control_end, "ALIVE_SECONDS", 0.01)
    clock = Clock()
    async with end() as listening:
        relay = Relay(listening.addresses(None), clock)
        async with relay.running():
            await until(lambda: relay.policies == [policy()])
            yield listening, relay, clock


async def test_a_relay_without_a_control_process_drops_its_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    async with with_policy(monkeypatch) as (listening, relay, clock):
        await listening.listener.close()
        await until(lambda: not relay.link.emit(sized_capture()))  # it has noticed
        clock.now += POLICY_SECONDS
        await until(lambda: relay.policies == [policy(), None])


async def test_a_new_control_process_that_has_no_policy_yet_does_not_revive_an_expired_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with with_policy(monkeypatch) as (listening, relay, clock):
        new = RelayLink()  # who connects is told Alive, and every ALIVE_SECONDS again
        listening.listener.dismiss()
        await until(lambda: listening.link.relays == 0)
        clock.now += 7200.0
        await until(lambda: relay.policies == [policy(), None])
        listening.listener.admit = new.serve
        async with looping(new.run()):
            await until(lambda: new.reporting == 1)
            clock.now += 1.0
            await asyncio.sleep(0.05)
            new.set_policy(policy(generation=2))  # it is read after each Alive before it
            await until(lambda: relay.policies[2:])
        assert relay.policies == [policy(), None, policy(generation=2)]


async def test_a_relay_whose_policy_expired_asks_for_one_on_a_new_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    async with with_policy(monkeypatch, looks_every=0.5) as (listening, relay, clock):
        clock.now += 7200.0  # Alive arrives before the relay looks at its clock
        await until(lambda: relay.policies == [policy(), None, policy()])
        await until(lambda: listening.link.relays == 1)


# --- peers without the token ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [b"GET / HTTP/1.1\r\n\r\n", frame(b"x"), encode(STATS), encode(policy())])
async def test_what_is_no_hello_is_not_answered(first: bytes) -> None:
    async with end() as listening:
        assert await said(listening.port, first) == []
        assert listening.link.relays == 0


async def test_a_frame_that_is_longer_than_any_hello_is_not_waited_for() -> None:
    async with end() as listening:
        assert await said(listening.port, (MAX_HELLO_BYTES + 1).to_bytes(4, "big")) == []


async def test_slow_peers_are_left(monkeypatch: pytest.MonkeyPatch, made: Certificate) -> None:
    monkeypatch.setattr(relay_listener, "HANDSHAKE_SECONDS", 0.1)
    for used in (None, made):
        async with end(used) as listening:
            assert await said(listening.port, b"\0\0") == []


async def test_many_peers_without_a_hello_do_not_keep_a_relay_out(
    made: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a limit each of them would hold the buffers of a TLS connection for five seconds."""
    monkeypatch.setattr(relay_listener, "HANDSHAKE_SECONDS", 10 * HANG_SECONDS)  # none is closed for its time
    async with end(made) as listening:
        idle = [await asyncio.open_connection("127.0.0.1", listening.port) for _ in range(2 * MAX_HANDSHAKES)]

        def closed() -> int:
            return sum(reader.at_eof() or reader.exception() is not None for reader, _ in idle)

        await until(lambda: closed() >= MAX_HANDSHAKES)
        relay = Relay(listening.addresses(made))
        async with relay.running():
            await until(lambda: relay.policies == [policy()])
        await until(lambda: closed() == MAX_HANDSHAKES + 1)  # the oldest one for the relay
        for _, writer in idle:
            writer.close()


async def test_failed_handshakes_are_paced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor's time that they take is bounded: the next connection waits in the kernel's queue."""
    pauses: list[float] = []

    class Asyncio:
        """With a clock that stands still."""

        def __getattr__(self, name: str) -> object:
            return getattr(asyncio, name)

        async def sleep(self, seconds: float) -> None:
            pauses.append(seconds)
            await asyncio.sleep(0)

    async with end() as listening:
        monkeypatch.setattr(relay_listener, "asyncio", Asyncio())
        for _ in range(3):
            await said(listening.port, encode(known(token="guess")))
        for _ in range(2):
            reader, writer = await asyncio.open_connection("127.0.0.1", listening.port)
            writer.write(encode(known()))
            await read_frame(reader)
            writer.close()
    assert sum(pauses) == pytest.approx(3 * relay_listener.PAUSE_SECONDS)
