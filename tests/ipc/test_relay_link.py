"""What relays and the control process tell each other, over a real Unix socket."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from secrets import token_hex

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.captures import sized_capture
from tests.support.relay_listener import hello, listening
from tests.support.waiting import until
from tests.support.wire import policy

from hemostat.ipc import relay_end
from hemostat.ipc.addresses import ControlAddresses
from hemostat.ipc.control_end import MAX_LARGE_MESSAGES, RelayLink, add
from hemostat.ipc.messages import (
    MAX_MESSAGE_BYTES,
    Alive,
    Capture,
    Hello,
    MessageReader,
    OutcomeReport,
    SampledCount,
    Stats,
    encode,
)
from hemostat.ipc.relay_end import MAX_QUEUED_BYTES, MAX_QUEUED_REPORTS, REPORTS_PER_MESSAGE, ControlLink
from hemostat.ipc.supervised import is_compiled

POLICY = policy()


def stats(requests: float, *, ready: bool = True) -> Stats:
    return Stats(
        counters={"hemostat_requests_total": {("/v1/models", "ok"): requests}},
        overhead_buckets=[1, 2],
        overhead_sum=0.5,
        ready=ready,
    )


class Link:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.captures: list[Capture] = []
        self.outcomes: list[OutcomeReport] = []
        self.sampled: list[SampledCount] = []
        self.link = RelayLink()
        self.link.on_capture = self.captures.append
        self.link.on_outcome = self.outcomes.append
        self.link.on_sampled = self.sampled.append

    async def relay(self, said: Hello | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Of a relay that was admitted."""
        reader, writer = await asyncio.open_unix_connection(str(self.path))
        writer.write(encode(said or hello(token_hex(4))))
        return reader, writer


@pytest.fixture
async def link(tmp_path: Path) -> AsyncIterator[Link]:
    made = Link(tmp_path / "s")
    async with listening(made.link, made.path):
        yield made


def outcome(number: int = 0) -> OutcomeReport:
    return OutcomeReport("chat text greedy", "v", True, b"%d" % number, b"", {"loop": False}, 7)


async def test_reports_of_outcomes_are_sent_together(link: Link) -> None:
    sender = ControlLink(ControlAddresses(str(link.path)), 0, lambda _: None, lambda: stats(1))
    assert not sender.report_outcome(outcome()), "not connected"
    running = asyncio.create_task(sender.run())
    await until(lambda: link.link.relays == 1)
    for number in range(REPORTS_PER_MESSAGE + 3):
        assert sender.report_outcome(outcome(number))
    await until(lambda: len(link.outcomes) == REPORTS_PER_MESSAGE)
    sender.report()
    await until(lambda: len(link.outcomes) == REPORTS_PER_MESSAGE + 3)
    assert link.outcomes == [outcome(number) for number in range(REPORTS_PER_MESSAGE + 3)]
    running.cancel()
    await sender.close()


async def test_counts_of_sampled_requests_are_not_lost_while_there_is_no_control_process(link: Link) -> None:
    sender = ControlLink(ControlAddresses(str(link.path)), 0, lambda _: None, lambda: stats(1))
    sender.sampled.update("chat", "skipped", "n", 20)
    sender.sampled.update("chat", "skipped", "n", None)
    sender.report()  # not connected
    running = asyncio.create_task(sender.run())
    await until(lambda: link.sampled == [SampledCount("chat", "skipped", "n", 2.0, 1.0, 20)])
    sender.sampled.update("chat", "dropped", "link_full", 3, 0.5)
    sender.report()
    await until(lambda: link.sampled[1:] == [SampledCount("chat", "dropped", "link_full", 0.5, 0.0, 3)])
    running.cancel()
    await sender.close()


async def test_reports_of_outcomes_are_dropped_while_the_link_is_full(tmp_path: Path) -> None:
    hold = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(encode(Alive()))
        await hold.wait()
        writer.close()

    server = await asyncio.start_unix_server(serve, str(tmp_path / "s"))
    sender = ControlLink(ControlAddresses(str(tmp_path / "s")), 0, lambda _: None, lambda: stats(1))
    running = asyncio.create_task(sender.run())
    await until(lambda: sender.emit(sized_capture(size=MAX_QUEUED_BYTES)))
    await until(lambda: not sender.emit(sized_capture(size=MAX_QUEUED_BYTES)))
    accepted = sum(sender.report_outcome(outcome(number)) for number in range(2 * MAX_QUEUED_REPORTS))
    assert accepted == MAX_QUEUED_REPORTS
    hold.set()
    running.cancel()
    await sender.close()
    server.close()


async def test_few_large_messages_are_received_at_a_time(link: Link) -> None:
    """However many relays begin one: else the control process would have to hold all of them."""
    whole = encode(sized_capture(size=5_000_000))
    writers = [(await link.relay())[1] for _ in range(MAX_LARGE_MESSAGES + 2)]
    for writer in writers:
        writer.write(whole[:-1000])

    def stuck() -> list[asyncio.StreamWriter]:
        return [writer for writer in writers if writer.transport.get_write_buffer_size()]

    await until(lambda: len(stuck()) == 2)
    waiting = stuck()
    for _ in range(100):
        await asyncio.sleep(0)
    assert stuck() == waiting
    assert not link.captures
    for writer in writers:
        writer.write(whole[-1000:])
    await until(lambda: len(link.captures) == len(writers))
    for writer in writers:
        writer.close()


async def test_a_capture_that_is_too_large_for_a_message_is_dropped(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would end the connection."""
    monkeypatch.setattr(relay_end, "MAX_MESSAGE_BYTES", 10_000)
    sender = ControlLink(ControlAddresses(str(link.path)), 0, lambda _: None, lambda: stats(1))
    running = asyncio.create_task(sender.run())
    await until(lambda: sender.emit(sized_capture(size=1000)))
    assert not sender.emit(sized_capture(size=20_000))
    assert sender.emit(sized_capture(size=1000))
    running.cancel()
    await sender.close()


async def test_captures_arrive_and_figures_add_up_over_relays_and_restarts(link: Link) -> None:
    (_, one), (_, two) = await link.relay(), await link.relay()
    one.write(encode(stats(3)) + encode(sized_capture("a")))
    two.write(encode(stats(4, ready=False)))
    await until(lambda: link.link.total().counters == {"hemostat_requests_total": {("/v1/models", "ok"): 7}})
    assert [c.request_id for c in link.captures] == ["a"]
    assert link.link.ready
    one.close()
    await until(lambda: link.link.relays == 1)
    assert link.link.total().counters == {"hemostat_requests_total": {("/v1/models", "ok"): 7}}, (
        "a dead relay counts on"
    )
    assert not link.link.ready
    (_, again) = await link.relay()
    again.write(encode(stats(1)))
    await until(lambda: link.link.total().overhead_buckets == [3, 6])
    two.close()
    again.close()


async def test_what_compiles_a_relay_is_said_once(link: Link, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    command = "HATCH_BUILD_HOOKS_ENABLE=1 pip install"
    for pid, compiled, said in ((7, True, 0), (8, False, 1), (9, False, 1)):
        (_, writer) = await link.relay(hello(pid=pid, compiled=compiled))
        await until(lambda pid=pid: f"(pid {pid}, " in caplog.text)
        assert caplog.text.count(command) == said
        writer.close()


@pytest.mark.parametrize("compiled", [True, False])
async def test_a_relay_that_connects_is_logged(link: Link, caplog: pytest.LogCaptureFixture, compiled: bool) -> None:
    caplog.set_level(logging.INFO)
    (_, writer) = await link.relay(hello(pid=7, worker=2, compiled=compiled))
    await until(lambda: f"relay 2 connected (pid 7, {'compiled' if compiled else 'interpreted'})" in caplog.text)
    writer.close()


def test_whether_a_module_is_compiled() -> None:
    assert is_compiled("msgspec._core")
    assert not is_compiled("msgspec.json")
    assert not is_compiled("hemostat.not_a_module")


async def test_policy_reaches_relays_that_are_there_and_those_that_come(link: Link) -> None:
    reader, writer = await link.relay()
    await until(lambda: link.link.relays == 1)
    link.link.set_policy(POLICY)
    late, late_writer = await link.relay()
    assert MessageReader().feed(await late.read(100_000)) == [POLICY]
    frames, received = MessageReader(), list[object]()
    while len(received) < 2:
        received += frames.feed(await reader.read(100_000))
    assert received == [Alive(), POLICY]
    writer.close()
    late_writer.close()


@pytest.mark.parametrize("junk", [b"\0\0\0\1x", (MAX_MESSAGE_BYTES + 1).to_bytes(4, "big"), encode(POLICY)])
async def test_nonsense_ends_that_link_only(link: Link, junk: bytes) -> None:
    (_, good), (bad_reader, bad) = await link.relay(), await link.relay()
    bad.write(junk)
    assert await bad_reader.read() == encode(Alive())
    good.write(encode(sized_capture("still here")))
    await until(lambda: [c.request_id for c in link.captures] == ["still here"])
    good.close()
    bad.close()


@given(st.lists(st.integers(1, 40), max_size=30))
def test_frames_at_any_split(cuts: list[int]) -> None:
    messages = [hello(pid=1, worker=2), stats(1), sized_capture("x"), POLICY]
    data = b"".join(map(encode, messages))
    reader, received, at = MessageReader(), [], 0
    for cut in cuts:
        received += reader.feed(data[at : at + cut])
        at += cut
    received += reader.feed(data[at:])
    assert received == messages


def test_add_keeps_what_only_one_side_has() -> None:
    other = Stats(counters={"x": {(): 1.0}}, overhead_buckets=[1], overhead_sum=0.0, ready=False)
    total = add(stats(2), other)
    assert total.counters == {"hemostat_requests_total": {("/v1/models", "ok"): 2}, "x": {(): 1.0}}
    assert total.overhead_buckets == [2, 2]
