"""From a capture to a profile that serves: the real control process's parts and a real learner, between a reference and
an engine of a small world."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from tests.support import oracle
from tests.support.captures import capture
from tests.support.control import control, settings, status_json
from tests.support.fake_vllm import VOCAB, FakeVllm, serving
from tests.support.learner_world import D, K, World, learners, logprobs, make, save
from tests.support.samples import values
from tests.support.state_reference import Singles, StateReference, in_process
from tests.support.waiting import until

from hemostat.config.schema import Calibration
from hemostat.control import composition
from hemostat.control.composition import Control
from hemostat.engines.messages import RankReport, TapMessage, TapRun
from hemostat.ipc.messages import REST_KIND, Capture, Policy
from hemostat.learner.client import Learner
from hemostat.reference import monitor
from hemostat.reference.references import References
from hemostat_calibration.arrays import Ids
from hemostat_calibration.profiles import transform
from hemostat_calibration.records import TokenRecord
from hemostat_calibration.statistics.split import held_out

TOKENS = 16


def prompt_of(seed: int) -> Ids:
    return np.array([seed % VOCAB, seed // VOCAB], np.int32)


def seed_of(prompt: Ids) -> int:
    return int(prompt[0]) + VOCAB * int(prompt[1])


class WorldReference(StateReference):
    """Says of a prompt's every continuation what the world's reference says."""

    def __init__(self, world: World, folder: Path) -> None:
        super().__init__(in_process("ref", "digest", VOCAB, D, folder))
        self.world = world

    def states(self, prompt: Ids, output: Ids) -> Singles:
        # What others than this test ask is answered, too.
        seed = seed_of(prompt) if (len(prompt), len(output)) == (2, TOKENS) else 0
        return self.world.hidden(seed, len(output))[0]

    def logits(self, states: Singles) -> Singles:
        return states @ self.world.weight.T


class WorldEngine:
    """The compressed model with the plugin: it holds what it is told, and taps."""

    def __init__(self, world: World, plane: Control) -> None:
        self.world = world
        self.one = plane
        self.held: list[str] = []

    def reports(self) -> None:
        report = RankReport("boot", 0, 1, self.held, VOCAB, {}, "v1", "0.32.0")
        self.held = self.one.engines.reports.update(report, time.monotonic())

    def serves(self, seed: int, policy: Policy, **damage: Any) -> Capture:
        """A request's capture, after its tap. damage: fields of the tap's run."""
        h = self.world.hidden(seed, TOKENS)[1]
        z = (h @ self.world.weight.T).astype(np.float64)
        wanted = policy.serving_by_kind.get(REST_KIND)
        requested = wanted if wanted in policy.acknowledged else None
        profiles = [p for v in self.held if (p := self.one.profile_manager.catalogue.get(v)) is not None]
        log_c = logprobs(z)
        shifts = {p.version: oracle.shift(p, z) for p in profiles}
        served = logprobs(z + shifts[requested]) if requested is not None else log_c
        output = np.array(
            [np.random.default_rng((seed, t)).choice(VOCAB, p=np.exp(row)) for t, row in enumerate(served)]
        )
        normalizers = {v: np.log((np.exp(log_c) * np.exp(s)).sum(1)).astype("<f8").tobytes() for v, s in shifts.items()}
        reading = next((ids for p in profiles if (ids := transform.anchors(p)) is not None), None)
        run: dict[str, Any] = {"versions": normalizers, "applied": requested}
        if reading is not None:
            features = z[:, reading] - z[:, reading].mean(1, keepdims=True)
            run |= {"anchors": transform.anchors_digest(reading), "features": features.astype("<f2").tobytes()}
        self.one.engines.reports.taps.update(
            TapMessage("boot", [TapRun(nonce=f"n{seed}", start=0, tokens=TOKENS, **(run | damage))]), time.monotonic()
        )
        ids = np.full((TOKENS, K + 1), -1, "<i4")
        ids[:, :K] = np.argsort(-log_c, 1)[:, :K]
        emitted = log_c[np.arange(TOKENS), output]
        values = np.take_along_axis(log_c, np.maximum(ids, 0).astype(int), 1)
        absent = ~(ids == output[:, None]).any(1)
        ids[absent, K], values[absent, K] = output[absent], emitted[absent]
        values[ids < 0] = -np.inf
        return msgspec.structs.replace(
            capture(f"r{seed}"),
            model="fake",
            requested=requested,
            arm="treated" if requested else "control",
            nonce=f"n{seed}",
            prompt_token_ids=prompt_of(seed).astype("<i4").tobytes(),
            output_token_ids=output.astype("<i4").tobytes(),
            top_k=K,
            candidate_ids=ids.tobytes(),
            candidate_logprobs=values.astype("<f4").tobytes(),
            emitted_logprobs=emitted.astype("<f4").tobytes(),
            captured_at=time.monotonic(),
        )


def idle(learner: Learner) -> bool:
    """Its process has learned from all that came, and has proposed what it was asked for."""
    waits = bool(learner._records) or learner._batch_pending or bool(learner._proposals)
    return not learner._learning or not (waits or learner._requested)


class Bench:
    def __init__(self, plane: Control, reference: WorldReference) -> None:
        self.one = plane
        self.reference = reference
        self.engine = WorldEngine(reference.world, plane)
        self.told: list[Policy] = []
        self.learned_from: list[bytes] = []
        self._seed = 0
        plane.link.set_policy = self.told.append  # type: ignore[method-assign]
        offer = plane.learner.update

        def note(record: TokenRecord) -> None:
            self.learned_from.append(record.unit)
            offer(record)

        plane.learner.update = note  # type: ignore[method-assign]

    async def ready(self) -> None:
        await until(lambda: self.one.monitor.state == "ready")
        await until(lambda: self.one.learner.state == "learning")
        for _ in range(2):
            self.engine.reports()
        self.one.policy.publish()

    async def requests(self, count: int, **damage: Any) -> None:
        """That many more, all of them to their end."""
        for _ in range(count):
            self._seed += 1
            self.one.pipeline.offer(self.engine.serves(self._seed, self.told[-1], **damage))
        assert self.one.pipeline.scorer is not None
        await until(lambda: self.one.pipeline.scorer.pending == 0)  # type: ignore[union-attr]
        # Limits are counted in requests: a learner that a busy machine gives no time would be too late for them.
        await until(lambda: idle(self.one.learner), 120)
        self.engine.reports()
        self.engine.reports()
        self.one.policy.publish()

    async def until(self, condition: Any, requests: int) -> None:
        """Requests until it is so, at most that many."""
        for _ in range(0, requests, 20):
            if condition():
                return
            await self.requests(20)
        assert condition(), status_json(self.one)


@asynccontextmanager
async def bench(folder: Path, monkeypatch: pytest.MonkeyPatch, **constants: Any) -> AsyncIterator[Bench]:
    monkeypatch.setattr(composition, "PERIODIC_SECONDS", 0.05)
    for name, value in {"rank": 8, **constants}.items():
        monkeypatch.setattr(Calibration, name, value)
    world = make(vocab_size=VOCAB)
    reference = WorldReference(world, save(world, folder / "checkpoint"))
    monkeypatch.setattr(composition, "make_references", lambda _: References(reference))
    calibration = {
        "mode": "auto",
        "min_tokens": 1500,
        "held_out_fraction": 0.5,
        "clamp_nats": 1.5,
        "anchors": 48,
    }
    with serving(FakeVllm()) as url:
        made = settings(url, reference={"backend": "transformers", "model": "world"}, calibration=calibration)
        async with control(folder, made, loops=True) as plane:
            learning = asyncio.create_task(plane.learner.run())
            try:
                started = Bench(plane, reference)
                await started.ready()
                yield started
            finally:
                learning.cancel()
                await asyncio.gather(learning, return_exceptions=True)
    assert learners() == []


async def test_a_contextual_profile_is_learned_evaluated_judged_and_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as b:
        profiles = b.one.profile_manager
        (probe,) = b.engine.held
        assert profiles.report.describe(probe)["state"] == "probe"  # type: ignore[index]

        def candidate() -> Any:
            contextual = (profiles.catalogue.get(v) for v in profiles.trials.tested_versions)
            return next((p for p in contextual if p is not None and p.family == "contextual"), None)

        await b.until(lambda: candidate() is not None, 600)
        proposed = candidate().version
        assert proposed in b.engine.held
        assert probe not in b.engine.held, "the candidate's anchors are the same"
        await b.until(lambda: profiles.serving.selected == proposed, 800)
        (promoted,) = [e for e in b.one.profiles.listing()["events"] if e["decision"] == "promote"]
        assert promoted["version"] == proposed
        assert promoted["evidence"]["log_e_adjusted"] >= promoted["evidence"]["needed"]
        assert b.told[-1].serving_by_kind.get(REST_KIND) == proposed
        assert b.told[-1].acknowledged >= {proposed}
        await b.requests(40)
        assert b.one.measured.measurements.recovered(proposed)["estimate"] > 0.1  # type: ignore[index]

        # Nothing was learned from what judged, nor were its hidden states asked for.
        assert len(set(b.learned_from)) > 50
        hidden_for = [b.one.templates.assign(prompt, b"") for prompt in b.reference.hidden_for]
        assert not any(held_out(unit, 0.5) for unit in [*b.learned_from, *hidden_for])
        status = status_json(b.one)["learner"]
        assert status["sources"]["hidden"] == status["tokens"] > 1500
        assert b.one.pipeline.scorer is not None
        assert not b.one.pipeline.scorer.stages.features.dropped
        assert values(b.one.learner.samples())["hemostat_learned_tokens_total", "hidden"] == status["tokens"]


@pytest.mark.slow
async def test_when_the_error_changes_the_profile_is_rolled_back_and_a_new_one_is_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch, half_life_tokens=1500) as b:
        profiles = b.one.profile_manager
        await b.until(lambda: profiles.serving.selected is not None, 1400)
        before = profiles.serving.selected
        # From now on the compressed model errs the other way.
        turned = replace(b.reference.world, bend=-b.reference.world.bend)
        b.reference.world = b.engine.world = turned
        await b.until(lambda: profiles.events.counts["roll_back", "harm"] == 1, 400)
        assert b.told[-1].serving_by_kind.get(REST_KIND) is None
        await b.until(lambda: profiles.serving.selected is not None, 2000)
        assert profiles.serving.selected != before
        await b.requests(40)
        assert b.one.measured.measurements.recovered(profiles.serving.selected)["estimate"] > 0.1  # type: ignore[index]


async def test_features_that_cannot_be_used_are_dropped_and_the_rest_is_learned_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as b:
        assert b.one.pipeline.scorer is not None
        await b.requests(8, anchors="f" * 32)
        await b.requests(8, anchors=None, features=None)
        await b.requests(8, features=np.full(TOKENS * 48, np.inf, "<f2").tobytes())
        await b.requests(8, features=np.full(TOKENS * 48, np.nan, "<f2").tobytes())
        await b.requests(8, features=np.zeros(TOKENS * 47, "<f2").tobytes())
        assert b.one.pipeline.scorer.stages.features.dropped == {
            "other_anchors": 8, "not_sent": 8, "not_finite": 8, "masked": 8, "shape": 8
        }  # fmt: skip
        assert status_json(b.one)["requests"]["scored"] == 40
        await until(lambda: sum(b.one.learner.tokens_by_source().values()) == TOKENS * len(b.learned_from))
        assert {source for source, tokens in b.one.learner.tokens_by_source().items() if tokens} == {"hidden_from_list"}
        assert b.one.pipeline.scorer is not None
        assert values(b.one.pipeline.scorer.stages.samples())["hemostat_features_dropped_total", "masked"] == 8


async def test_off_ends_the_learner_and_observe_starts_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, monkeypatch) as b:
        await b.one.actions.set_mode("off")
        await until(lambda: not learners())
        assert status_json(b.one)["learner"]["state"] == "off"
        assert status_json(b.one)["learner"]["detail"] == "calibration is off"
        await b.requests(4)
        assert not b.reference.hidden_for
        await b.one.actions.set_mode("observe")
        await until(lambda: b.one.learner.state == "learning")


async def test_with_a_vllm_reference_the_folder_of_its_checkpoint_must_be_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(monitor, "POLL_SECONDS", 0.02)
    folder = save(make(vocab_size=VOCAB), tmp_path / "checkpoint")
    (folder / "config.json").write_text(json.dumps({"vocab_size": VOCAB}))
    (tmp_path / "empty").mkdir()
    with serving(FakeVllm(noise=0.5)) as ours, serving(FakeVllm()) as theirs:
        for named in (None, str(tmp_path / "empty"), str(folder)):
            made = settings(
                ours,
                reference={"backend": "vllm", "url": theirs, "folder": named},
                calibration={"mode": "observe", "anchors": 48},
            )
            async with control(tmp_path, made, loops=True) as plane:
                learning = asyncio.create_task(plane.learner.run())
                await until(lambda plane=plane: plane.monitor.state == "ready")  # type: ignore[misc]
                if named != str(folder):
                    assert plane.learner.state == "unavailable"
                    said = status_json(plane)["learner"]["detail"]
                    assert "name the reference's checkpoint in reference.folder" in said
                    assert named is None or "empty has no config.json" in said
                else:
                    await until(lambda plane=plane: plane.learner.state == "learning")  # type: ignore[misc]
                    assert not plane.learner.wants_hidden_states, "there are no hidden states to ask for"
                    assert status_json(plane)["learner"]["anchors"] == 48
                learning.cancel()
                await asyncio.gather(learning, return_exceptions=True)
