"""The control process between relays, a reference and an engine that are made up."""

from __future__ import annotations

import asyncio
import json
import random
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import msgspec
import numpy as np
from tests.characterization.golden import dumps
from tests.characterization.worlds import Truth, V, World, entropy, log_softmax, top
from tests.support.relay_listener import hello, listen
from tests.support.served_models import pair, served_models

from hemostat.admin.access import Tokens
from hemostat.admin.app import create_app
from hemostat.config.schema import Alarm, Settings, Shadow
from hemostat.control import composition, operator_actions
from hemostat.control.composition import Control
from hemostat.engines.request_secrets import RequestSecrets
from hemostat.ipc.messages import OVERHEAD_BUCKETS, Alive, Capture, Stats, encode
from hemostat.reference.monitor import ReferenceState
from hemostat.reference.protocol import ReferenceFailure, ReferenceInfo, ReferenceScores, ScoreRequest
from hemostat.reference.references import References
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.profiles.transform import anchors_digest
from hemostat_calibration.records import Candidates, TokenRecord

from .life import stored_state
from .profiles import (
    ANCHORS,
    MODEL,
    effect,
    sha256,
)

TOKEN = "secret"
K = 5
"""`shadow.top_k`."""
DATA_PORT = 1234
TIMEOUT_SECONDS = 30.0
"""Seconds that anything is waited for; the machine may be busy."""


class Clock:
    """The control process's clocks: they stand still but for `pass_`."""

    def __init__(self) -> None:
        self.monotonic, self.wall = 1000.0, 1_700_000_000.0

    def pass_(self, seconds: float) -> None:
        self.monotonic += seconds
        self.wall += seconds


class FakeReference:
    """Knows the reference's distributions of every prompt that it was told of. fails: reason of its next failures."""

    def __init__(self, truths: dict[bytes, Truth], *, itself: bool = False) -> None:
        self._truths = truths
        self._itself = itself
        self.fails = ""

    async def start(self) -> ReferenceInfo:
        return INFO

    async def adapters(self) -> frozenset[str]:
        return frozenset({"sql"})

    async def score(self, request: ScoreRequest) -> ReferenceScores:
        if self.fails == "bug":
            raise RuntimeError("a bug")
        if self.fails:
            raise ReferenceFailure(self.fails, "as told")
        prompt, output, ids = request.prompt, request.output, request.ids
        truth = self._truths[np.asarray(prompt, "<i4").tobytes()]
        logprobs = truth.compressed if self._itself else truth.reference
        if self._itself or request.reshaped:
            rows = np.arange(len(output))[:, None]
            logprobs = log_softmax(logprobs + 0.02 * np.sin(rows + np.arange(V) + len(prompt)))
        rows = np.arange(len(output))
        given = ids >= 0
        if self._itself:  # a vLLM server: its top ids only
            given &= (ids[:, :, None] == top(logprobs, 12)[0][:, None, :]).any(-1)
        return ReferenceScores(
            at=np.where(given, np.take_along_axis(logprobs, np.maximum(ids, 0), -1), np.nan),
            top=Candidates(*top(logprobs, 12 if self._itself else 6)),
            emitted=logprobs[rows, output],
            entropy=None if self._itself else entropy(logprobs),
            expected_shift={} if self._itself else {p.version: effect(p, truth)[0] for p in request.profiles},
        )

    async def close(self) -> None:
        return


INFO = ReferenceInfo("made-up/reference", "digest", "float32", V, True, hidden_detail="it is made up")


class NotingControl(Control):
    """The control process, with every record noted as it comes from the scorer."""

    def __init__(self, *args: Any, **more: Any) -> None:
        self.noted: list[TokenRecord] = []
        super().__init__(*args, **more)
        if self.pipeline.scorer is not None:
            self.pipeline.scorer._emit = self._note

    def _note(self, record: TokenRecord, capture: Capture) -> None:
        self.noted.append(record)
        self.pipeline.update(record, capture)


class Relay:
    """A relay's end of the socket. `frames` holds the bytes of every policy frame that it was sent."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pid: int, worker: int) -> None:
        self._reader, self._writer = reader, writer
        self.frames: list[bytes] = []
        self.send(hello(str(pid), pid=pid, worker=worker))

    def send(self, message: Any) -> None:
        self._writer.write(encode(message))

    async def listen(self) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await self._reader.readexactly(4)
                result = head + await self._reader.readexactly(int.from_bytes(head, "big"))
                if result != encode(Alive()):
                    self.frames.append(result)

    def close(self) -> None:
        self._writer.close()


class Pipeline:
    """A control process with fakes for both models, driven from outside: by its socket and its admin port."""

    def __init__(self, control: NotingControl, clock: Clock, references: list[FakeReference], socket: Path) -> None:
        self._control, self._clock, self._socket = control, clock, socket
        self.reference = references[0]
        self._truths: dict[bytes, Truth] = references[0]._truths
        self._tasks: list[asyncio.Task[None]] = []
        self._relays: list[Relay] = []
        self._sent = 0
        app = create_app(control, Tokens(TOKEN), lambda: clock.monotonic)
        self._http = httpx.AsyncClient(
            transport=httpx.ASGITransport(app),
            base_url="http://127.0.0.1",
            headers={"authorization": f"Bearer {TOKEN}"},
        )

    @asynccontextmanager
    async def _writing(self) -> AsyncIterator[None]:
        """What is queued for the store is written at once: an operator's action waits for it."""
        task = asyncio.create_task(self._control.writer.run())
        try:
            yield
            assert await self._control.writer.wait_until_written(TIMEOUT_SECONDS)
        finally:
            task.cancel()

    # Both models.

    def models_are_known(self) -> None:
        """As once the reference has started and both models were compared."""
        plane = self._control
        plane.monitor.served = served_models(pair(MODEL, self.reference, INFO, {"sql", "lora"}, {"sql"}))
        plane.monitor.state, plane.monitor.detail = ReferenceState.READY, "made-up/reference (float32)"
        plane.monitor.on_change()

    def start_scoring(self) -> None:
        """The loops that take captures off the queue, and score some again for the noise floor."""
        pipeline = self._control.pipeline
        assert pipeline.scorer is not None
        self._run(pipeline.scorer.run(1))
        if self._control.noise_floor is not None:
            self._run(self._control.noise_floor.run())

    def _run(self, loop: Any) -> None:
        self._tasks.append(asyncio.create_task(loop))

    def housekeeping(self, seconds: float) -> None:
        """Time passes, and what the control process does again and again is done once."""
        self._clock.pass_(seconds)
        self._control.do_periodic()

    # Relays.

    async def relay(self, pid: int, worker: int) -> Relay:
        before = self._control.link.relays
        reader, writer = await asyncio.open_unix_connection(str(self._socket))
        relay = Relay(reader, writer, pid, worker)
        self._relays.append(relay)
        self._run(relay.listen())
        await until(lambda: self._control.link.relays > before)
        return relay

    async def relay_leaves(self, relay: Relay) -> None:
        """Once it has read all that it was sent."""
        generation = self._control.policy.generation
        await until(lambda: relay.frames and policy_of(relay.frames[-1])["generation"] == generation)
        before = self._control.link.relays
        relay.close()
        await until(lambda: self._control.link.relays < before)

    async def stats(self, relay: Relay, counters: dict[str, dict[tuple[str, ...], float]], overhead: list[int]) -> None:
        """Figures of a relay since it started; overhead: counts of the first buckets."""
        before = self._control.link.total()
        buckets = [*overhead, *[0] * (len(OVERHEAD_BUCKETS) + 1 - len(overhead))]
        relay.send(Stats(counters=counters, overhead_buckets=buckets, overhead_sum=0.001 * sum(overhead), ready=True))
        await until(lambda: self._control.link.total() != before)

    async def captures(self, relay: Relay, *captures: Capture) -> None:
        """Sent one after the other, each once the one before has come to its end."""
        for capture in captures:
            self.send(relay, capture)
            await self.settled()

    def send(self, relay: Relay, capture: Capture) -> None:
        self._sent += 1
        relay.send(capture)

    async def settled(self) -> None:
        """All that was sent has come to an end, the noise floor included."""
        current, floor = self._control.pipeline, self._control.noise_floor
        await until(
            lambda: current.received == self._sent and not current.pending and not (floor and floor._queue.qsize())
        )

    async def received(self) -> None:
        await until(lambda: self._control.pipeline.received == self._sent)

    def capture(
        self,
        n: int,
        world: World,
        *,
        tokens: int = 6,
        sampling: dict[str, float] | None = None,
        damage: Callable[[Truth], Truth] = lambda truth: truth,
        **more: Any,
    ) -> Capture:
        """The n-th request to the compressed model of `world`; what it said becomes known to both models' fakes."""
        given = {"temperature": 1.0, "top_p": 1.0, "sampling_top_k": 0, "min_p": 0.0} | (sampling or {})
        truth = damage(world.truth(n, tokens, greedy=given["temperature"] == 0.0))
        prompt = np.array([n % V, n // V % V, *(n * (3 + k) % V for k in range(n % 4))], "<i4").tobytes()
        self._truths[prompt] = truth
        ids, logprobs = top(truth.compressed, K, truth.emitted)
        emitted = truth.compressed[np.arange(tokens), truth.emitted]
        made = {
            "request_id": f"request-{n}",
            "route": "/v1/completions",
            "model": MODEL,
            "label": "",
            "kind": f"{'chat' if 'chat' in str(more.get('route')) else 'completions'} text sampled",
            "arm": "none",
            "requested": None,
            "nonce": "",
            "stream": n % 2 == 0,
            "prompt_token_ids": prompt,
            "output_token_ids": truth.emitted.astype("<i4").tobytes(),
            "top_k": K,
            "candidate_ids": ids.astype("<i4").tobytes(),
            "candidate_logprobs": logprobs.astype("<f4").tobytes(),
            "emitted_logprobs": emitted.astype("<f4").tobytes(),
            "finish_reason": "stop" if n % 3 else "length",
            "captured_at": self._clock.monotonic,
        }
        return Capture(**(made | given | more))

    # The engine's plugin and operators, over HTTP.

    async def engine_reports(self, versions: list[str], counters: dict[str, int]) -> Any:
        report = {"boot_id": "boot", "rank": 0, "world_size": 1, "versions": versions, "vocab_size": V}
        report |= {"counters": counters, "runner": "v1", "vllm": "0.11"}
        answer = await self.post("/api/v1/engine/report", report)
        self._control.policy.publish()
        return answer

    async def tap(
        self, n: int, capture: Capture, applied: str | None, *, features: str = "", rows: slice = slice(None)
    ) -> Capture:
        """The engine says what every profile in question does to this request; the capture with its tap's name.

        applied: the version that it applied. rows: the positions that it speaks about.
        features: "" none, "given" but for the first row, of "other" anchors, or "masked" in all rows.
        """
        truth = self._truths[capture.prompt_token_ids]
        at = range(len(truth.emitted))[rows]
        profiles = self._control.profile_manager.evaluated_profiles()
        run: dict[str, Any] = {
            "nonce": f"nonce-{n}",
            "start": at.start,
            "tokens": len(at),
            "versions": {p.version: effect(p, truth)[1][rows].astype("<f8").tobytes() for p in profiles},
            "applied": applied,
        }
        if features:
            values = truth.compressed[rows][:, ANCHORS]
            values = values - values.mean(1, keepdims=True)
            if features != "other":
                values[: None if features == "masked" else 1] = np.nan
            digest = anchors_digest(ANCHORS + 1 if features == "other" else ANCHORS)
            run |= {"anchors": digest, "features": values.astype("<f2").tobytes()}
        body = msgspec.msgpack.encode({"boot_id": "boot", "taps": [run]})
        answer = await self._http.post("/api/v1/engine/tap", content=body)
        assert answer.status_code == 204, answer.text
        return msgspec.structs.replace(capture, nonce=f"nonce-{n}")

    async def import_profile(self, profile: CalibrationProfile) -> str:
        async with self._writing():
            answer = await self._http.post("/api/v1/profiles", content=profile.to_bytes())
        assert answer.status_code == 200, answer.text
        return str(answer.json()["version"])

    async def propose(self, profile: CalibrationProfile, tokens: int) -> None:
        """Proposes a profile, as a learner does."""
        async with self._writing():
            proposals = self._control.profile_manager.proposals
            assert proposals.propose(profile, f"learned from {tokens} tokens", {"tokens": tokens})

    async def post(self, path: str, body: Any) -> Any:
        async with self._writing():
            answer = await self._http.post(path, json=body)
        return answer.json() if answer.status_code == 200 else f"{answer.status_code} {answer.text}"

    async def get(self, path: str) -> Any:
        answer = await self._http.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json() if answer.headers["content-type"].startswith("application/json") else answer.text

    # What came of it.

    def record(self, request_id: str) -> dict[str, Any]:
        """The record that was built of a capture."""
        return next(plain_record(record) for record in self._control.noted if record.request_id == request_id)

    @property
    def scored(self) -> int:
        return len(self._control.noted)

    @property
    def selected(self) -> str | None:
        return self._control.profile_manager.serving.selected

    async def close(self) -> None:
        for relay in self._relays:
            relay.close()
        await self._http.aclose()
        for task in self._tasks:
            if task.done() and not task.cancelled():
                task.result()
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def pipeline(folder: Path, clock: Clock, **settings: Any) -> AsyncIterator[Pipeline]:
    """A control process as it is after its start, restored from the store."""
    truths: dict[bytes, Truth] = {}
    references = [FakeReference(truths), FakeReference(truths, itself=True)]
    given: dict[str, Any] = {
        "upstream": {"url": "http://127.0.0.1:1"},
        "reference": {"backend": "vllm", "url": "http://127.0.0.1:1"},
        "admin": {"port": 0, "token": TOKEN},
        "evidence": {"cycle_hours": 0.0} | settings.pop("evidence", {}),
    }
    made = Settings.model_validate(given | settings)
    wants_floor = made.shadow.floor_fraction > 0.0
    with ExitStack() as patches:
        for module, name, value in (
            (composition, "boot_id", lambda: "a run of the machine"),
            (composition, "make_references", lambda _: References(references[0])),
            (composition, "make_compressed_scorer", lambda _: references[1] if wants_floor else None),
            # So that both happen within the day.
            (Shadow, "max_queue", 8),
            (Alarm, "clear_after", 5),
            # So that what is answered does not depend on how busy the disk is.
            (operator_actions, "MAX_WRITE_SECONDS", 60.0),
        ):
            patches.enter_context(mock.patch.object(module, name, value))
        control = NotingControl(
            made,
            DATA_PORT,
            clock=lambda: clock.monotonic,
            wall=lambda: clock.wall,
            steady=lambda: clock.monotonic,
            draw=random.Random(7).random,
        )
        control.engines.reports.nonce_prefix = "0123456789abcdef"  # made up anew by every process
        control.engines.reports.secrets = RequestSecrets(lambda: "0123456789abcdef" * 2)
        control.stored_state.salt = bytes(range(32))
        await control.start()
        relays = listen(control.link, folder / "control.sock")
        control.policy.publish()
        driving = Pipeline(control, clock, references, folder / "control.sock")
        try:
            yield driving
        finally:
            await driving.close()
            await relays.close()
            await control.close()


def plain_record(record: TokenRecord) -> dict[str, Any]:
    """JSON-ready; an array is its type, its shape and a line of text a row."""
    return {field.name: _plain(getattr(record, field.name)) for field in fields(record)}


def _plain(value: Any) -> Any:
    match value:
        case np.ndarray():
            rows = value.reshape(len(value), -1).tolist()
            text = [" ".join(f"{float(x):.7g}" for x in row) for row in rows]
            return {f"{value.dtype} {list(value.shape)}": text if value.ndim > 1 else " ".join(text)}
        case bytes():
            return value.hex()
        case StrEnum():
            return str(value)
        case _ if is_dataclass(value):
            return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
        case _ if hasattr(value, "items"):
            return {key: _plain(value[key]) for key in sorted(value)}
    return value


def policy_of(frame: bytes) -> dict[str, Any]:
    """A frame's message as any msgpack reader sees it; sets are sorted, as their order on the wire is of no meaning."""
    policy: dict[str, Any] = msgspec.msgpack.decode(with_sorted_sets(frame)[4:])
    return {name: _plain(value) for name, value in policy.items()}


def with_sorted_sets(frame: bytes) -> bytes:
    """The frame of a policy in which every set is sorted: the order depends on the process."""
    policy: dict[str, Any] = msgspec.msgpack.decode(frame[4:])
    sets = ("acknowledged", "calibrated_models", "kinds", "labels", "scorable_models", "unscorable_models")
    result = {name: sorted(value) if name in sets and value else value for name, value in policy.items()}
    return frame[:4] + msgspec.msgpack.encode(result)


def stored(path: Path) -> dict[str, Any]:
    """What a SQLite store holds."""
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT version, data, created FROM profiles ORDER BY created, version").fetchall()
        events = connection.execute("SELECT body FROM events ORDER BY id").fetchall()
        state = connection.execute("SELECT key, value FROM state ORDER BY key").fetchall()
    connection.close()
    return {
        "profiles": [[version, sha256(data), created] for version, data, created in rows],
        "events": [[event.get(key) for key in ("decision", "reason", "kind", "why")] for event in map(_json, events)],
        "state": {key: stored_state(key, value) for key, value in state},
    }


def alarm_shape(kept: str) -> dict[str, Any]:
    """The alarm's state in the store, too long for a golden file: its keys, and a digest of its structure.

    Its values are left out, as their last digits depend on the platform; the status after a restart shows them.
    """

    def shape(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shape(item) for key, item in value.items()}
        if isinstance(value, list):
            return [shape(item) for item in value]
        return type(value).__name__

    state = json.loads(kept)
    return {"keys": sorted(state), "sha256": sha256(dumps(shape(state)).encode())}


def _json(row: tuple[str]) -> dict[str, Any]:
    event: dict[str, Any] = json.loads(row[0])
    return event


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while not condition():
            await asyncio.sleep(0.001)
