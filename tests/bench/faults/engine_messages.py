"""What a client names to the engine, and what an engine sends, change no figure, take no memory and silence nobody."""

from __future__ import annotations

import itertools
import time
import tracemalloc
from collections.abc import Iterator
from unittest import mock

import httpx
import msgspec
import numpy as np
from tests.bench.faults import Row
from tests.support.captures import candidates_of
from tests.support.engine_admin import TOKEN, EngineAdmin
from tests.support.fake_vllm import FakeVllm, serving
from tests.support.taps import sent
from tests.support.wire import Wire, chat, policy

from hemostat.engines.messages import EVENTS, MAX_POSITIONS, RankReport, TapMessage, TapRun, decode_tap
from hemostat.engines.reports import PluginReports
from hemostat.openai.routes import CHAT
from hemostat.scoring.capture_arrays import output_ids, prompt_ids
from hemostat.scoring.intake import captures_from_tap
from hemostat_engine.agent import Agent, Identity
from hemostat_engine.library import Counters, Library
from hemostat_engine.settings import Settings
from hemostat_engine.taps import Taps

NAME = "engine_messages"
TAKES = "half a minute"
MIB = 1 << 20
TOKENS = 60
ENGINES = 1000
NAMES = 5
WATCHED_SECONDS = 20.0
MAX_SILENCE_SECONDS = 5.0


def kl_told(own: dict[str, str] | None) -> float:
    """KL(reference‖compressed) in nats per token, from the ids that the plugin hands out, all others as one event; own:
    what the client sets in vllm_xargs."""
    fake, reference = FakeVllm(seed=3, plugin=True), FakeVllm(seed=3, noise=0.5)
    with serving(fake) as url, httpx.Client(base_url=url) as client:
        wire = Wire(client)
        wire.interceptor.policy = policy(tap=True, tap_tokens=True, prefer_plugin=True, shadow_top_k=20)
        wire.send(CHAT, chat(max_tokens=TOKENS, ignore_eos=True) | ({"vllm_xargs": own} if own else {}))
    (capture,) = captures_from_tap(wire.captures[0], fake.handed_out, 1 << 14)
    given, total = candidates_of(capture), 0.0
    context, output = prompt_ids(capture).tolist(), output_ids(capture).tolist()
    for row, token in enumerate(output):
        ids = given.ids[row]
        compressed, wanted = given.logprobs[row][ids >= 0], reference.logprobs(context)[ids[ids >= 0]]
        rests = [max(1e-12, 1.0 - float(np.exp(values).sum())) for values in (wanted, compressed)]
        total += float((np.exp(wanted) * (wanted - compressed)).sum()) + rests[0] * float(np.log(rests[0] / rests[1]))
        context.append(token)
    return total / len(output)


def figure_row() -> Row:
    told, without = kl_told({"hemostat_tap_top": "2"}), kl_told(None)
    case = "`vllm_xargs.hemostat_tap_top: 2` of a client: KL told with it, and without it"
    measured = f"{told:.3f}, {without:.3f} nats"
    return Row(case, "0.038, 0.085 nats", measured, "equal", told == without)


def tap_row() -> Row:
    """A tap of the last position with many versions."""
    versions = iter(range(ENGINES))
    value = sent([0.5])
    runs = [
        TapRun("n", MAX_POSITIONS - 1, 1, {f"{next(versions):032x}": value for _ in range(16)}, None) for _ in range(60)
    ]
    body = msgspec.msgpack.encode(TapMessage("boot", runs))
    registry = PluginReports()
    tracemalloc.start()
    registry.taps.update(decode_tap(body), 0.0)
    registry.taps.take("n", TOKENS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    case = f"a tap message of {len(body) / 1000:.0f} kB with 960 versions of the last position: memory that it takes"
    return Row(case, "1.9 GiB", f"{peak / MIB:.2f} MiB", "<= 1 MiB", peak <= MIB)


def names_row() -> Row:
    """Engines that come and go, each with 64 names of its own."""
    registry = PluginReports()
    for number in range(ENGINES):
        counters = {f"x{number}_{name}": 1 for name in range(64)}
        registry.update(RankReport(f"b{number}", 0, 1, [], 9, counters, "v1", ""), 20.0 * number)
    kept = len(registry.counters(20.0 * ENGINES))
    case = f"{ENGINES:,} engines that each report 64 counters of their own: names kept"
    return Row(case, f"{64 * ENGINES:,}", float(kept), f"<= {len(EVENTS)}", kept <= len(EVENTS))


def silence_row() -> Row:
    """Versions that clients named, and an admin port that accepts connections and never answers, as the plugin runs."""
    hanging, healthy = EngineAdmin(), EngineAdmin()
    hanging.hang = ("/",)
    reports: list[float] = []
    report = healthy.registry.update

    def noted(*arguments: object) -> list[str]:
        reports.append(time.monotonic())
        return report(*arguments)  # type: ignore[arg-type]

    library, counters = Library(9), Counters()
    identity = Identity("boot", 0, 1, 9, "v1", "")
    agent = Agent(identity, Settings(f"{hanging.url},{healthy.url}", TOKEN), library, counters, Taps(counters))
    with mock.patch.object(healthy.registry, "report", noted):
        for number in range(NAMES):
            library.get(f"{number:032x}")
        started = time.monotonic()
        agent.start()
        time.sleep(WATCHED_SECONDS)
        ended = time.monotonic()
    hanging.close()
    agent.stop()
    healthy.close()
    moments = [started, *reports, ended]
    silence = max(after - before for before, after in itertools.pairwise(moments))
    case = f"{NAMES} unknown versions of clients and a port that hangs: longest time without a report to the other"
    limit = f"<= {MAX_SILENCE_SECONDS:g} s"
    return Row(case, "14.7 s of the first 20", f"{silence:.1f} s", limit, silence <= MAX_SILENCE_SECONDS)


def rows() -> Iterator[Row]:
    yield figure_row()
    yield tap_row()
    yield names_row()
    yield silence_row()
