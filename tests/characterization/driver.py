"""The only file of these tests that imports the product or constructs any of its objects.

When modules move or constructors change, this file is edited, and the tests and the golden files stay as they are.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import fields, is_dataclass, replace
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import msgspec
import numpy as np
from tests.characterization.golden import dumps
from tests.characterization.worlds import Array, Truth, V, World, entropy, log_softmax, top
from tests.support.oracle import shift
from tests.support.served_models import pair, served_models

from hemostat.admin.app import create_app
from hemostat.config.schema import Calibration, Settings
from hemostat.control import composition
from hemostat.control.composition import Control
from hemostat.ipc.messages import OVERHEAD_BUCKETS, Capture, Hello, Stats, encode
from hemostat.profiles.decisions import DECISIONS, MAX_EVENTS, Reason
from hemostat.profiles.manager import ProfileManager
from hemostat.profiles.persistence import STATE_KEYS
from hemostat.reference.monitor import ReferenceState
from hemostat.reference.protocol import ReferenceFailure, ReferenceInfo, ReferenceScores
from hemostat.reference.references import References
from hemostat.store.lease import Lease
from hemostat.store.memory import MemoryStore
from hemostat.store.protocol import StoredProfile
from hemostat_calibration.divergence.record_gains import RecordGains
from hemostat_calibration.errors import HemostatError
from hemostat_calibration.profiles.contextual import contextual_profile, probe_profile
from hemostat_calibration.profiles.profile import CalibrationProfile, temperature_bias
from hemostat_calibration.profiles.transform import anchors_digest
from hemostat_calibration.records import Candidates, Shift, TokenRecord, validate
from hemostat_calibration.statistics.split import held_out

MODEL = "m"
HELD_OUT = 0.3
"""`calibration.held_out_fraction`."""
TOP_K = 20
"""Candidates of a record that is fed to `Life`."""
ANCHORS = np.arange(6, dtype=np.int32)
CLAMP = 2.0
BIASED = World(bias=1.2)
"""A large error: proofs are short."""
TOKENS = 24
"""Of a record that is fed to `Life`."""


@cache
def keys(*, judged: bool) -> tuple[bytes, ...]:
    """Prompt keys of the held-out side, or of the side that is learned from."""
    return tuple(key for key in (b"%d" % n for n in range(10_000)) if held_out(key, HELD_OUT) is judged)


# --- profiles ---------------------------------------------------------------------------------------------------------


def helpful(seed: int = 0) -> CalibrationProfile:
    """Takes back what the biased world adds, but for a little noise."""
    noise = 0.1 * np.random.default_rng(seed).normal(size=V)
    return temperature_bias(MODEL, V, 1.0, noise - BIASED.bias, CLAMP)


def partial(part: float) -> CalibrationProfile:
    """Takes back that part of what the biased world adds."""
    return temperature_bias(MODEL, V, 1.0, -part * BIASED.bias, CLAMP)


def harmful(seed: int = 5, vocabulary: int = V) -> CalibrationProfile:
    return temperature_bias(MODEL, vocabulary, 1.0, np.random.default_rng(seed).normal(0, 0.8, vocabulary), CLAMP)


def tempered(temperature: float) -> CalibrationProfile:
    return temperature_bias(MODEL, V, temperature, -BIASED.bias, CLAMP)


def contextual(part: float = 1.0, first_anchor: int = 0) -> CalibrationProfile:
    """Takes back `part` of what the biased world adds, in any context."""
    return contextual_profile(
        model=MODEL,
        anchors=ANCHORS + first_anchor,
        linear=np.zeros((1, 2)),
        offset=np.ones(1),
        up=-part * BIASED.bias[:, None],
        clamp_nats=CLAMP,
    )


def reading(seed: int = 0) -> CalibrationProfile:
    """A contextual profile that does read its anchors: a small network over them, with a trust region."""
    rng = np.random.default_rng(seed)
    return contextual_profile(
        model=MODEL,
        anchors=ANCHORS,
        linear=0.05 * rng.normal(size=(2, 4)),
        offset=np.array([1.0, 0.1]),
        up=np.column_stack([-BIASED.bias, 0.1 * rng.normal(size=V)]),
        clamp_nats=CLAMP,
        hidden=0.1 * rng.normal(size=(3, 4)),
        hidden_offset=np.zeros(3),
        middle=0.1 * rng.normal(size=(2, 3)),
        middle_offset=np.zeros(2),
        out=0.1 * rng.normal(size=(2, 2)),
        fisher=np.eye(2),
        kl_limit=1.0,
    )


def learners_probe(count: int = len(ANCHORS)) -> CalibrationProfile:
    """What a contextual learner asks engines to hold."""
    return probe_profile(MODEL, V, ANCHORS[:count], 1.0)


def effect(profile: CalibrationProfile, truth: Truth) -> tuple[Array, Array]:
    """E_r[Δz], as the reference gives it, and log E_c[e^Δz], as the engine does; [T], nats."""
    delta = shift(profile, truth.compressed)
    return (np.exp(truth.reference) * delta).sum(-1), np.log(np.exp(truth.compressed + delta).sum(-1))


def _sha256(data: bytes) -> str:
    """Its first 24 digits: golden files are read by people."""
    return hashlib.sha256(data).hexdigest()[:24]


# --- the life of profiles ---------------------------------------------------------------------------------------------


def written(method: str, *args: Any) -> dict[str, Any]:
    """One write of the store in its golden form; the one place that knows how the product hands writes over."""
    match method, args:
        case "put_profile", [StoredProfile() as profile]:
            found = {"write": method, "version": profile.version, "created": profile.created}
            return found | {"sha256": _sha256(profile.data)}
        case "delete_profile", [version]:
            return {"write": method, "version": version}
        case "append_event", [event]:
            return {"write": method, "event": event}
        case "set_state" | "raise_state", [key, value]:
            return {"write": method, "key": key, "value": stored_state(key, value)}
    raise AssertionError(f"a write that this adapter does not know: {method}{args}")


def stored_state(key: str, value: Any) -> Any:
    """A state of the store; those of tests and kinds, which are long, as their most important parts."""
    if key == "tests":
        tests = json.loads(value)
        return {name: {kind: test["units"] for kind, test in kinds.items()} for name, kinds in tests["tests"].items()}
    if key == "kinds":
        found = json.loads(value)
        return {
            "scope": found["scope"],
            "serving": {name: [kind["version"], kind["window"]] for name, kind in found["kinds"].items()},
            "queue": found["queue"],
        }
    return value


OF_ADAPTERS = frozenset({Reason.PROBE, Reason.SLOT})


def every_decision() -> list[tuple[str, str]]:
    """Each decision about a profile with its reason; those about adapters alone have tests of their own."""
    return [(decision, reason) for decision, reason in DECISIONS if reason not in OF_ADAPTERS]


class _NotingWrites:
    """`StoreWrites` of a `Life`."""

    def __init__(self, life: Life) -> None:
        self._life = life

    def put_profile(self, profile: StoredProfile) -> None:
        self._life.save("put_profile", profile)

    def delete_profile(self, version: str) -> None:
        self._life.save("delete_profile", version)

    def append_event(self, event: dict[str, Any]) -> None:
        self._life.save("append_event", event)

    def set_state(self, key: str, value: str | None) -> None:
        self._life.save("set_state", key, value)

    def raise_state(self, key: str, value: int) -> None:
        self._life.save("raise_state", key, value)

    def put_blob(self, key: str, data: bytes) -> None:
        raise AssertionError("profiles keep no blobs")


class Life:
    """A `ProfileManager` whose writes go to a store at once and to `saves`, and which is fed whole records.

    store: the one of another `Life`, for a restart or another replica. leads: None without a shared store.
    """

    def __init__(
        self,
        store: Any = None,
        *,
        known: bool = True,
        tempered: bool = False,
        leads: bool | None = None,
        at: float = 0.0,
        **calibration: Any,
    ) -> None:
        self.store: Any = store or MemoryStore()
        self.now = at
        self.saves: list[dict[str, Any]] = []
        given = {"mode": "auto", "min_tokens": 300, "clamp_nats": CLAMP, "held_out_fraction": HELD_OUT} | calibration
        self._lease = Lease(shared=leads is not None, clock=lambda: self.now)
        if leads:
            self.lead()
        self._profiles = ProfileManager(
            Calibration.model_validate(given),
            _NotingWrites(self),
            lambda: self.now,
            default_temperature_is_one=tempered,
            lease=self._lease,
        )
        if known:
            self.know()

    def save(self, method: str, *args: Any) -> None:
        self.saves.append(written(method, *args))
        getattr(self.store, method)(*args)

    def lead(self) -> None:
        """This replica has the lease from now on."""
        self._lease.grant(float("inf"))

    def lose_lead(self) -> None:
        self._lease.lose()

    def know(self, model: str = MODEL, vocabulary: int = V) -> None:
        self._profiles.set_model_pair(model, vocabulary)

    def restore(self) -> None:
        """What a new process does with the store of an earlier one."""
        self._profiles.restoring.restore(*self._stored())

    def take_up(self) -> None:
        """What a replica does with what another one has written."""
        self._profiles.restoring.reload(*self._stored())

    def _stored(self) -> tuple[list[StoredProfile], dict[str, str | None], list[dict[str, Any]]]:
        states = {name: self.store.get_state(name) for name in STATE_KEYS}
        return self.store.profiles(), states, self.store.events(MAX_EVENTS)

    def lose_store(self) -> None:
        """The store has lost its data; all that a restart needs is written again."""
        self.store = MemoryStore()
        self._profiles.restoring.write_all({})

    def damage(self, version: str) -> None:
        """Put bytes into the store that are no profile."""
        self.store.put_profile(StoredProfile(version, b"junk", self.now))

    def feed(
        self,
        world: World,
        prompts: Iterable[bytes],
        until: Callable[[], bool] = lambda: False,
        *,
        exact: bool = True,
        **more: Any,
    ) -> int:
        """One record a prompt, a second apart, until `until` is true; returns how many.

        exact: the reference and the engine say what each profile in question does.
        """
        fed = 0
        for n, key in enumerate(prompts):
            if until():
                break
            self.now += 1.0
            record = self._record(world.truth(n, TOKENS), key, exact, more)
            record = replace(record, kind=self._profiles.kinds.see(record.kind))
            self._profiles.observe(record, RecordGains(record))
            fed += 1
        return fed

    def _record(self, truth: Truth, key: bytes, exact: bool, more: dict[str, Any]) -> TokenRecord:
        rows = np.arange(len(truth.emitted))
        ids, values = top(truth.compressed, TOP_K, truth.emitted)
        at = np.take_along_axis(truth.reference, np.maximum(ids, 0), -1)
        shifts = {p.version: Shift(*effect(p, truth)) for p in self._profiles.evaluated_profiles()} if exact else {}
        return validate(
            TokenRecord(
                vocab_size=V,
                prompt_key=key,
                output_ids=truth.emitted.astype(np.int32),
                compressed=Candidates(ids, values),
                reference_at=np.where(ids >= 0, at, np.nan),
                reference=Candidates(*top(truth.reference, 8)),
                compressed_emitted=truth.compressed[rows, truth.emitted],
                reference_emitted=truth.reference[rows, truth.emitted],
                reference_entropy=entropy(truth.reference),
                shifts=shifts,
                **more,
            )
        )

    # What the operator and the learner do; the answer of the product, or its refusal.

    def import_profile(self, profile: CalibrationProfile, scope: str = "") -> str:
        return self._asked(lambda: self._profiles.operator.import_profile(profile, scope))

    def promote(self, version: str, kind: str | None = None) -> str:
        return self._asked(lambda: self._profiles.operator.promote(version, kind))

    def pin(self, version: str) -> str:
        return self._asked(lambda: self._profiles.operator.pin(version))

    def unpin(self) -> str:
        return self._asked(self._profiles.operator.unpin)

    def roll_back(self, kind: str | None = None) -> str:
        return self._asked(lambda: self._profiles.operator.roll_back("asked for by the operator", kind))

    def harm(self, kind: str) -> None:
        """An outcome of the treated requests of this kind is proven to be worse."""
        self._profiles.lifecycle.roll_back(kind, Reason.OUTCOMES, "valid JSON fell by more than the margin", {})

    def release(self, kind: str | None = None) -> str:
        return self._asked(lambda: self._profiles.operator.release(kind))

    def end(self) -> None:
        """The process ends, and writes what it knows."""
        self._profiles.writer.save()

    def set_mode(self, mode: str) -> str:
        return self._asked(lambda: self._profiles.operator.set_mode(mode))

    def force(self, profile: CalibrationProfile) -> str:
        return self._asked(lambda: self._profiles.operator.force(profile))

    def probe(self, profile: CalibrationProfile) -> str:
        return self._asked(lambda: self._profiles.proposals.set_probe(profile))

    def propose(self, profile: CalibrationProfile, tokens: int, scope: str = "") -> str:
        """By the contextual learner."""
        why, report = f"learned in context from {tokens} tokens", {"tokens": tokens, "won_back": 0.25}
        return self._asked(lambda: self._profiles.proposals.propose(profile, why, report, scope))

    def _asked(self, act: Callable[[], object]) -> str:
        try:
            answer = act()
        except HemostatError as error:
            return f"refused: {error}"
        return "done" if answer is None else str(answer)

    @property
    def selected(self) -> str | None:
        return self._profiles.serving.selected

    @property
    def by_kind(self) -> dict[str, str]:
        return dict(self._profiles.serving.version_by_kind)

    @property
    def candidates(self) -> list[str]:
        return list(self._profiles.trials.tested_versions)

    @property
    def window(self) -> int:
        """Of what serves all: the held-out requests in which it is watched."""
        return int(self._profiles.report.status()["selected"]["window"])

    def state(self) -> dict[str, Any]:
        """What relays, engines and the console are told."""
        one, told = self._profiles, self._profiles.report.status()
        candidates = [f"{c['version']} {c['scope']!r} {c['source']} {c['requests']}" for c in told["candidates"]]
        evaluated = [profile.version for profile in one.evaluated_profiles()]
        found = {
            "mode": told["mode"],
            "pinned": told["pinned"],
            "forced": one.serving.forced,
            "serving": one.serving.version,
            "shown": one.serving.reported,
            "by_kind": one.serving.version_by_kind,
            "wanted": one.engine_versions(),
            "evaluated": "as wanted" if evaluated == one.engine_versions() else evaluated,
            "candidates": candidates,
            "waiting": [f"{c['version']} {c['scope']!r} {c['source']}" for c in told["waiting"]],
            "learned": [told["learned_requests"], told["learned_tokens"]],
            "tests_begun": told["tests_begun"],
            "scopes": sorted(told["scopes"]),
            "promotions": one.lifecycle.promotions,
            "rollbacks": one.lifecycle.rollbacks,
        }
        return {name: value for name, value in found.items() if value not in (None, [], {}, False, 0)}

    def decisions(self) -> dict[str, int]:
        """Counted by decision and reason, those that happened."""
        return {" ".join(pair): count for pair, count in sorted(self._profiles.events.counts.items()) if count}

    def status(self) -> dict[str, Any]:
        return self._profiles.report.status()

    def listing(self) -> dict[str, Any]:
        return self._profiles.report.listing()

    def request_parameters(self) -> dict[str, Any]:
        """What `calibration.apply: request` puts into a request."""
        return self._profiles.request_parameters()


# --- the pipeline -----------------------------------------------------------------------------------------------------

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

    async def score(self, prompt: Any, output: Any, ids: Any, profiles: Any = (), *_: Any, **how: Any) -> Any:
        if self.fails == "bug":
            raise RuntimeError("a bug")
        if self.fails:
            raise ReferenceFailure(self.fails, "as told")
        truth = self._truths[np.asarray(prompt, "<i4").tobytes()]
        logprobs = truth.compressed if self._itself else truth.reference
        if self._itself or how.get("reshaped"):
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
            expected_shift={} if self._itself else {p.version: effect(p, truth)[0] for p in profiles},
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
        self.pipeline.use_record(record, capture)


class Relay:
    """A relay's end of the socket. `frames` holds the bytes of every policy frame that it was sent."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pid: int, worker: int) -> None:
        self._reader, self._writer = reader, writer
        self.frames: list[bytes] = []
        self.send(Hello(pid=pid, worker=worker))

    def send(self, message: Any) -> None:
        self._writer.write(encode(message))

    async def listen(self) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await self._reader.readexactly(4)
                self.frames.append(head + await self._reader.readexactly(int.from_bytes(head, "big")))

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
        app = create_app(control, TOKEN, lambda: clock.monotonic)
        self._http = httpx.AsyncClient(
            transport=httpx.ASGITransport(app),
            base_url="http://127.0.0.1",
            headers={"authorization": f"Bearer {TOKEN}"},
        )

    # Both models.

    def models_are_known(self) -> None:
        """As once the reference has started and both models were compared."""
        one = self._control
        one.monitor.served = served_models(pair(MODEL, self.reference, INFO, {"sql", "lora"}, {"sql"}))
        one.monitor._set_state(ReferenceState.READY, "made-up/reference (float32)")

    def start_scoring(self) -> None:
        """The loops that take captures off the queue, and score some again for the noise floor."""
        pipeline = self._control.pipeline
        assert pipeline.scorer is not None
        self._run(pipeline.scorer.run(1))
        if pipeline.noise_floor is not None:
            self._run(pipeline.noise_floor.run())

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
        for one in captures:
            self.send(relay, one)
            await self.settled()

    def send(self, relay: Relay, capture: Capture) -> None:
        self._sent += 1
        relay.send(capture)

    async def settled(self) -> None:
        """All that was sent has come to an end, the noise floor included."""
        one = self._control.pipeline
        floor = one.noise_floor
        await until(lambda: one.received == self._sent and not one.pending and not (floor and floor.queued))

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
        prompt = np.array([n % V, n // V % V, *range(n % 4)], "<i4").tobytes()
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
            "versions": {p.version: effect(p, truth)[1][rows].tolist() for p in profiles},
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

    async def import_profile(self, profile: CalibrationProfile, scope: str = "") -> str:
        answer = await self._http.post("/api/v1/profiles", content=profile.to_bytes(), params={"scope": scope})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["version"])

    async def post(self, path: str, body: Any) -> Any:
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
    }
    made = Settings.model_validate(given | settings)
    wants_floor = made.shadow.floor_fraction > 0.0
    with ExitStack() as patches:
        for name, value in (
            ("make_references", lambda _: References(references[0])),
            ("make_compressed_scorer", lambda _: references[1] if wants_floor else None),
        ):
            patches.enter_context(mock.patch.object(composition, name, value))
        control = NotingControl(
            made,
            folder / "control.sock",
            DATA_PORT,
            clock=lambda: clock.monotonic,
            wall=lambda: clock.wall,
            draw=random.Random(7).random,
        )
        control.engines.replica = "0123456789abcdef"  # made up anew by every process
        control.salt.value = bytes(range(32))
        await control.start(made.calibration.force)
        control.policy.publish()
        one = Pipeline(control, clock, references, folder / "control.sock")
        try:
            yield one
        finally:
            await one.close()
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
    found = {name: sorted(value) if name in sets and value else value for name, value in policy.items()}
    return frame[:4] + msgspec.msgpack.encode(found)


def stored(path: Path) -> dict[str, Any]:
    """What a SQLite store holds."""
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT version, data, created FROM profiles ORDER BY created, version").fetchall()
        events = connection.execute("SELECT body FROM events ORDER BY id").fetchall()
        state = connection.execute("SELECT key, value FROM state ORDER BY key").fetchall()
    connection.close()
    return {
        "profiles": [[version, _sha256(data), created] for version, data, created in rows],
        "events": [
            [event.get(key) for key in ("decision", "reason", "scope", "kind", "why")] for event in map(_json, events)
        ],
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
    return {"keys": sorted(state), "sha256": _sha256(dumps(shape(state)).encode())}


def _json(row: tuple[str]) -> dict[str, Any]:
    event: dict[str, Any] = json.loads(row[0])
    return event


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while not condition():
            await asyncio.sleep(0.001)
