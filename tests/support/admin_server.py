"""An admin port that a browser can reach, in front of a real `Control` that has seen a little of everything."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import httpx
import msgspec
import numpy as np
import uvicorn
from tests.support.captures import INFO
from tests.support.control import TOKEN, connect_relay, control, scored, settings
from tests.support.records import Truth, log_softmax, make_record
from tests.support.served_models import pair, served_models
from tests.support.temperature_bias import temperature_bias
from tests.support.waiting import HANG_SECONDS
from tests.support.world import World

from hemostat.admin.access import Tokens
from hemostat.admin.app import create_app
from hemostat.admin.hardening import server_settings
from hemostat.control.composition import Control
from hemostat.ipc import control_end
from hemostat.ipc.messages import OVERHEAD_BUCKETS, OutcomeReport, SampledCount, Stats
from hemostat.reference.monitor import ReferenceState
from hemostat.scoring.record_users import NoiseFloorUsers
from hemostat_calibration.divergence.per_token import divergence
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.reasoning import Thinking
from hemostat_calibration.records import Arm, Sampling, TokenRecord

WORLD = World(bias=0.6, noise=0.3)
VOCABULARY = 60
SCORED_ROUTES = ("/v1/chat/completions", "/v1/completions")
KINDS = ("chat text sampled", "completions text sampled", "chat json sampled")
"""Of most requests of the first route, of those of the second, and of a few of the first."""
WARM_UP = 6
"""Requests before a profile serves the kinds that were met by then: the first two."""
SAMPLINGS = (Sampling(temperature=1.0), Sampling(temperature=0.0), Sampling(temperature=0.7, top_p=0.9))
GRAMMAR_REQUESTS = 8
ALARM_FROM = 80
"""Request with which the first route's model changes."""
T = TypeVar("T")


class Served:
    """`url` answers; `do` runs something in the control process's loop."""

    def __init__(self, plane: Control, server: uvicorn.Server, port: int, stop: Callable[[], None]) -> None:
        self.control, self.port, self._server, self.stop = plane, port, server, stop
        self._loop = asyncio.get_running_loop()
        self.url = f"http://127.0.0.1:{port}"

    @property
    def connections(self) -> int:
        return len(self._server.server_state.connections)

    def do(self, what: Callable[[Control], T]) -> T:
        async def run() -> T:
            return what(self.control)

        return self.wait(run())

    def wait(self, what: Awaitable[T]) -> T:
        async def run() -> T:
            return await what

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(30)


@asynccontextmanager
async def admin_client(plane: Control, tokens: Tokens = Tokens(TOKEN)) -> AsyncIterator[httpx.AsyncClient]:  # noqa: B008
    """Of the admin port, without a server. The store is written to meanwhile."""
    transport = httpx.ASGITransport(create_app(plane, tokens, lambda: 0.0))
    writing = asyncio.create_task(plane.writer.run())
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://admin") as client:
            yield client
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)


@contextmanager
def served(
    folder: Path, fill: Callable[[Control, Path], Awaitable[Any]] | None = None, **more: Any
) -> Iterator[Served]:
    """On a thread of its own, on a free port of this machine. A relay that `fill` connects may be silent."""
    listener = socket.create_server(("127.0.0.1", 0))
    number = listener.getsockname()[1]
    ready: list[Served] = []
    started, stop = threading.Event(), threading.Event()

    async def run() -> None:
        more.setdefault("reference", {"backend": "vllm", "url": "http://127.0.0.1:1"})
        made = settings(admin={"port": 0, "token": TOKEN, **more.pop("admin", {})}, **more)
        async with control(folder, made) as plane:
            kept = await fill(plane, folder) if fill is not None else None
            writing = asyncio.create_task(plane.writer.run())
            app = create_app(plane, Tokens.of(made.admin), time.monotonic, names=made.admin.names)
            server = uvicorn.Server(uvicorn.Config(app, **server_settings()))
            server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            while not server.started:
                await asyncio.sleep(0.01)
            ready.append(Served(plane, server, number, end))
            started.set()
            while not stop.is_set():
                await asyncio.sleep(0.02)
            app.state.closing.set()
            server.should_exit = True
            await serving
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
            if kept is not None:
                kept.close()

    def end() -> None:
        stop.set()
        thread.join(30)

    def live() -> None:
        with patch.object(control_end, "SILENCE_SECONDS", 3600.0):
            asyncio.run(run())

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    assert started.wait(HANG_SECONDS)
    try:
        yield ready[0]
    finally:
        end()


def profile(seed: int = 0) -> CalibrationProfile:
    """One that helps: it takes back most of the world's bias."""
    return temperature_bias("m", VOCABULARY, 1.0, -(0.9 - 0.2 * seed) * WORLD.bias, 1.0)


def record(n: int, serving: CalibrationProfile | None) -> TokenRecord:
    """The n-th request."""
    arm = Arm.NONE if serving is None else Arm.CONTROL if n % 3 == 0 else Arm.TREATED
    truth = WORLD.truth(n)
    route = SCORED_ROUTES[n % 4 == 3]
    if n >= ALARM_FROM and route == SCORED_ROUTES[0]:
        noise = World(noise=2.0).truth(n).compressed
        truth = Truth(truth.reference, log_softmax(truth.compressed + noise), truth.emitted)
    made = make_record(
        truth,
        20,
        profile=serving,
        sampling=SAMPLINGS[n % 3],
        applied=serving.version if serving and arm is Arm.TREATED else None,
    )
    label = "batch" if n % 5 == 0 else ""
    return replace(
        made, route=route, label=label, arm=arm, request_id=str(n), model="m", prompt_key=n.to_bytes(4, "big")
    )


def with_kind(made: TokenRecord, n: int) -> TokenRecord:
    """The n-th request, as a conversation of its own, of one of `KINDS` and of a client."""
    kind = KINDS[2] if n % 8 == 6 else KINDS[made.route == SCORED_ROUTES[1]]
    client = b"client %d" % (n % 5) if kind == KINDS[0] else b"one"
    return replace(made, kind=kind, conversation=made.prompt_key, client=client)


def stats(requests: int) -> Stats:
    return Stats(
        counters={
            "hemostat_requests_total": {
                ("/v1/chat/completions", "ok"): requests,
                ("/v1/completions", "ok"): requests // 3,
                ("other", "client_gone"): 2.0,
                ("/v1/chat/completions", "upstream_failed"): 1.0,
            },
            "hemostat_shadow_requests_total": {("skipped", "too_long"): 2.0, ("dropped", "queue_full"): 3.0},
            "hemostat_responses_finished_total": {
                ("treated", "stop"): 80.0,
                ("treated", "length"): 9.0,
                ("control", "stop"): 38.0,
                ("control", "length"): 6.0,
            },
            "hemostat_output_tokens_total": {("treated",): 3400.0, ("control",): 1800.0},
            "hemostat_repetition_loops_total": {("treated",): 1.0, ("control",): 3.0},
            "hemostat_structured_outputs_total": {
                ("treated", "json", "valid"): 7.0,
                ("control", "json", "invalid"): 1.0,
            },
        },
        overhead_buckets=[0, 5, requests, requests // 2, 9, 1, *[0] * (len(OVERHEAD_BUCKETS) - 5)],
        overhead_sum=requests / 1000,
        ready=True,
    )


async def everything(plane: Control, folder: Path) -> asyncio.StreamWriter:
    """Two routes, three kinds, three ways of decoding, two models, an alarm, drops. One profile serves the first kind,
    is taken from the second for harm to an outcome and is tested in the third; another one is tested."""
    writer = await connect_relay(plane, folder, 1, stats(120))
    plane.monitor.served = served_models(pair("m", info=INFO), pair("unmatched"))
    plane.monitor.state, plane.monitor.detail = ReferenceState.READY, "made-up/reference (float32)"
    plane.profile_manager.set_model_pair("m", VOCABULARY)
    plane.profile_manager.operator.set_mode("auto")
    serving = plane.profile_manager.operator.import_profile(profile())
    floor = NoiseFloorUsers(plane.monitor, plane.measured, plane.pipeline.users.other_models)
    held = None
    for n in range(160):
        if n == WARM_UP:
            plane.profile_manager.operator.promote(serving, KINDS[0])
            plane.profile_manager.operator.promote(serving, KINDS[1])
            plane.profile_manager.operator.import_profile(profile(1))
            held = plane.profile_manager.catalogue.get(serving)
        made = replace(with_kind(record(n, held), n), context_tokens=300 * (1 + n % 4), thinking=thinking(n))
        plane.pipeline.update(made, scored(str(n))[1])
        plane.pipeline.received += 1
        plane.pipeline.endings.scored(scored(str(n))[1])
        arm = ("control", "treated", "none")[n % 3]
        plane.measured.measurements.thinking.update(arm, made.thinking, "stop" if n % 10 else "length", fresh=True)
        if n % 4 == 0:
            truth = WORLD.truth(n)
            for model in ("compressed", "reference"):
                near = log_softmax(truth.reference + 0.01 * World(seed=n).truth(n).reference)
                floor.update(model, make_record(Truth(truth.reference, near, truth.emitted), 20))
        if n % 5 == 0:
            at = n - 160
            status = plane.status.current()
            proxy = msgspec.structs.replace(status.proxy, requests=7 * n)
            shadow = msgspec.structs.replace(status.shadow, reference_tokens=300 * n)
            status = msgspec.structs.replace(status, proxy=proxy, shadow=shadow)
            plane.history.update(time.monotonic() + 10 * at, time.time() + 10 * at, status)
    plane.pipeline.coverage.update_relayed(
        SampledCount("chat structured", "skipped", "structured_output", 12.0, 5.0, 700)
    )
    for n in range(GRAMMAR_REQUESTS):
        restricted = under_grammar(n)
        figures = divergence(restricted)
        conditional = plane.measured.measurements.conditional
        conditional.update(restricted, None, None, held_out=False, fresh=True, figures=figures)
    for kind, harmful in zip(KINDS[:2], (False, True), strict=True):
        for report in outcome_reports(kind, serving, harmful):
            plane.measured.outcomes.update(report)
        await plane.writer.write()  # the number of its trial
        plane.measured.outcomes.check()
    return writer


def under_grammar(n: int) -> TokenRecord:
    """The n-th request that a grammar restricts: at every other position to so few ids that all of them are listed."""
    truth = WORLD.truth(n)
    mask = np.random.default_rng(n).random(truth.compressed.shape) < 0.7
    mask[::2, 12:] = False
    mask[np.arange(len(mask)), truth.emitted] = True
    return replace(make_record(truth, 20, mask=mask), kind="chat grammar sampled", conversation=b"grammar %d" % n)


def thinking(n: int) -> Thinking | None:
    """Every fourth answer has none, and every tenth does not end it."""
    return None if n % 4 == 0 else Thinking(0, 3 + n % 5, ended=n % 10 != 0)


def outcome_reports(kind: str, version: str, harmful: bool) -> list[OutcomeReport]:
    """Answers of a kind by arm, of which those with the profile are cut, if it is harmful."""
    return [
        OutcomeReport(
            kind=kind,
            version=version,
            treated=n % 2 == 1,
            conversation=n.to_bytes(4, "big"),
            client=bytes([n % 7]),
            bad={"cut": harmful and n % 2 == 1, "empty": False},
            output_tokens=20,
        )
        for n in range(120)
    ]
