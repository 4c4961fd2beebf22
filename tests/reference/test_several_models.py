"""A server with several base models: each has its own reference, or is neither scored nor treated."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.captures import capture
from tests.support.control import control, settings, status_json
from tests.support.fake_lora import FakeLora
from tests.support.fake_vllm import VOCAB, FakeVllm, running
from tests.support.waiting import until

from hemostat.control.composition import Control
from hemostat.ipc.messages import Capture, Policy
from hemostat.profiles.serving import ServedModel
from hemostat.reference import monitor
from hemostat.reference.pair import ReferenceState
from hemostat.reference.protocol import ScoreRequest


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(monitor, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(monitor, "MODELS_SECONDS", 0.1)


class Bench:
    def __init__(self, plane: Control) -> None:
        self.one = plane
        self.told: list[Policy] = []
        plane.link.set_policy = self.told.append  # type: ignore[method-assign]

    async def scored(self, *captures: Capture) -> dict[str, Any]:
        """What became of all captures so far, after these."""
        before = status_json(self.one)["requests"]
        for item in captures:
            self.one.pipeline.offer(item)
        await until(lambda: self.total(status_json(self.one)["requests"]) >= self.total(before) + len(captures))
        result: dict[str, Any] = status_json(self.one)["requests"]
        return result

    @staticmethod
    def total(requests: dict[str, Any]) -> int:
        return int(requests["scored"] + sum(requests["skipped"].values()) + sum(requests["dropped"].values()))

    def state(self, model: str) -> ReferenceState | None:
        pair = self.one.monitor.served.of(model)
        return pair.state if pair is not None else None


@asynccontextmanager
async def bench(folder: Path, upstream: FakeVllm, reference: dict[str, Any], **more: Any) -> AsyncIterator[Bench]:
    async with running(upstream):
        made = settings(upstream.url, reference={"backend": "vllm"} | reference, **more)
        async with control(folder, made, loops=True) as plane:
            yield Bench(plane)


def emitted(fake: FakeVllm, made: Capture) -> list[float]:
    """The model's log-probabilities of the capture's output."""
    prompt, output = (np.frombuffer(ids, "<i4").tolist() for ids in (made.prompt_token_ids, made.output_token_ids))
    tokens = [*prompt, *output]
    return [float(fake.logprobs(tokens[:end])[tokens[end]]) for end in range(len(prompt), len(tokens))]


async def test_each_model_is_scored_on_its_own_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upstream = FakeVllm(model="a", others=(FakeVllm(model="b", seed=1), FakeVllm(model="c", seed=2)))
    async with running(FakeVllm(model="ref-a")) as first, running(FakeVllm(model="ref-b", seed=1)) as second:
        models = {"a": "ref-a", "b": {"model": "ref-b", "url": second.url}}
        async with bench(tmp_path, upstream, {"url": first.url, "models": models}) as made:
            await until(lambda: (made.state("a"), made.state("b"), made.state("c")) == ("ready", "ready", "none"))
            await until(lambda: made.told[-1].scorable_models == {"a", "b"} and made.told[-1].scoring)
            records = []
            emit = made.one.pipeline.update
            assert made.one.pipeline.scorer is not None
            monkeypatch.setattr(made.one.pipeline.scorer, "_emit", lambda *given: (records.append(given), emit(*given)))
            result = await made.scored(capture(model="a"), capture(model="b"), capture(model="c"), capture(model="d"))
            assert result["skipped"] == {"no_reference": 1, "unknown_model": 1}
            assert result["scored"] == 2
            for record, item in records:
                fake = {"a": first, "b": second}[item.model]
                np.testing.assert_allclose(record.reference_emitted, emitted(fake, item))
            assert {record.reference_model for record, _ in records} == {
                pair.reference.digest for pair in made.one.monitor.served.pairs if pair.reference is not None
            }
            assert made.one.profile_manager.serving.model == ServedModel("a", VOCAB)
            assert (made.told[-1].calibrated_models, made.told[-1].default_model) == ({"a"}, "a")
            status = status_json(made.one)
            assert [(m["names"], m["reference"], m["calibrated"]) for m in status["models"]] == [
                (["a"], "ref-a", True),
                (["b"], "ref-b", False),
                (["c"], "", False),
            ]
            assert status["models"][1]["figures"]["raw"]["requests"] == status["raw"]["requests"] == 1
            assert status["tokens_scored"] == 3, "the headline figures are of the calibrated model"


async def test_each_model_is_compared_with_itself_for_its_own_noise_floor(tmp_path: Path) -> None:
    upstream = FakeVllm(model="a", others=(FakeVllm(model="b", seed=1),))
    async with running(FakeVllm(model="ref-a")) as first, running(FakeVllm(model="ref-b", seed=1)) as second:
        models = {"a": "ref-a", "b": {"model": "ref-b", "url": second.url}}
        shadow = {"rate": 1.0, "top_k": 4, "floor_fraction": 1.0}
        async with bench(tmp_path, upstream, {"url": first.url, "models": models}, shadow=shadow) as made:
            await until(lambda: made.one.monitor.ready and made.state("b") == "ready")
            assert made.one.noise_floor is not None
            loop = asyncio.create_task(made.one.noise_floor.run())
            await made.scored(capture(model="b"))
            await until(lambda: sum(made.one.noise_floor.outcomes.values()) == 2)  # type: ignore[union-attr]
            loop.cancel()
            status = status_json(made.one)
            assert set(status["models"][1]["figures"]["noise_floor"]) == {"compressed", "reference"}
            assert status["noise_floor"] == {}
            asked = [body["model"] for _, body in upstream.seen if body.get("prompt_logprobs") and "prompt" in body]
            assert asked[-1:] == ["b"]


async def test_the_noise_floor_is_measured_where_the_first_engine_is_down(tmp_path: Path) -> None:
    async with running(FakeVllm(model="a")) as engine, running(FakeVllm()) as first:
        made = settings(
            upstream={"urls": ["http://127.0.0.1:9", engine.url]},
            reference={"backend": "vllm", "url": first.url},
            shadow={"rate": 1.0, "top_k": 4, "floor_fraction": 1.0},
        )
        async with control(tmp_path, made, loops=True) as plane:
            await until(lambda: plane.monitor.ready or "does not answer" in plane.monitor.detail)
            assert plane.monitor.ready, plane.monitor.detail
            assert plane.compressed_scorer is not None
            tokens = np.arange(3, dtype=np.int32)
            scores = await plane.compressed_scorer.score(ScoreRequest(tokens, tokens, tokens[:, None]))
            assert len(scores.emitted) == 3


async def test_without_a_mapping_the_reference_belongs_to_the_first_model(tmp_path: Path) -> None:
    upstream = FakeVllm(model="a", others=(FakeVllm(model="b"),))
    async with running(FakeVllm()) as first, bench(tmp_path, upstream, {"url": first.url}) as made:
        await until(lambda: made.state("a") == "ready")
        await until(lambda: made.told[-1].scorable_models == {"a"} and made.told[-1].scoring)
        assert made.state("b") == "none"
        assert (await made.scored(capture(model="b")))["skipped"] == {"no_reference": 1}
        result = {tuple(s.labels): s.value for s in made.one.monitor.samples() if s.name == "hemostat_model_info"}
        assert result == {("a", "fake"): 1.0, ("b", ""): 1.0}


async def test_two_names_of_one_model_share_its_reference_and_one_path_alone_does_not(tmp_path: Path) -> None:
    other = FakeVllm(model="b", seed=1, root="/models")
    upstream = FakeVllm(model="a", aliases=("also-a",), root="/models", others=(other,), adapters=("sql",))
    async with running(FakeVllm(adapters=("sql",))) as first, bench(tmp_path, upstream, {"url": first.url}) as made:
        await until(lambda: made.one.monitor.ready)
        await until(lambda: made.told[-1].scorable_models == {"a", "also-a", "sql"})
        assert made.told[-1].calibrated_models == {"a", "also-a", "sql"}
        assert (await made.scored(capture(model="also-a"), capture(model="sql"), capture(model="b")))["scored"] == 2
        assert made.state("b") == "none"


async def test_a_model_that_differs_from_its_reference_is_passed_while_the_other_is_scored(tmp_path: Path) -> None:
    upstream = FakeVllm(model="a", others=(FakeVllm(model="b"),))
    async with running(FakeVllm()) as first, running(FakeVllm(model="wrong", vocab_size=500)) as second:
        models = {"a": "fake", "b": {"model": "wrong", "url": second.url}}
        async with bench(tmp_path, upstream, {"url": first.url, "models": models}) as made:
            await until(lambda: (made.state("a"), made.state("b")) == ("ready", "mismatch"))
            await until(lambda: made.one.monitor.ready)
            assert "b: vocabulary: b has 512 tokens, the reference wrong has 500" in made.one.monitor.detail
            assert (await made.scored(capture(model="b"), capture(model="a")))["skipped"] == {"no_reference": 1}
            assert made.told[-1].scorable_models == {"a"}
            second.vocab_size = VOCAB
            await until(lambda: made.told[-1].scorable_models == {"a", "b"})
            second.vocab_size, upstream.others[0].vocab_size = 500, 511
            upstream.others = (FakeVllm(model="b", root="reloaded", vocab_size=511),)
            upstream.aliases = ("another",)  # the list has changed, so it is compared again
            await until(lambda: made.told[-1].scorable_models is not None and "b" not in made.told[-1].scorable_models)


async def test_a_reference_that_fails_does_not_stop_the_scores_of_the_other_model(tmp_path: Path) -> None:
    upstream = FakeVllm(model="a", others=(FakeVllm(model="b"),))
    async with running(FakeVllm()) as first, running(FakeVllm()) as second:
        models = {"a": "fake", "b": {"model": "fake", "url": second.url}}
        async with bench(tmp_path, upstream, {"url": first.url, "models": models}) as made:
            await until(lambda: (made.state("a"), made.state("b")) == ("ready", "ready") and made.one.monitor.ready)
            second.status = 500
            await made.scored(*[capture(model="b")] * made.one.breakers.of("b").threshold)
            await until(lambda: made.state("b") == "down")
            assert made.one.monitor.ready
            assert made.told[-1].scoring
            assert made.told[-1].scorable_models == {"a", "b"}, "a model keeps its match while its reference is away"
            assert (await made.scored(capture(model="a")))["scored"] == 1
            second.status = None
            made.one.breakers.of("b").cooldown = 0.0
            await until(lambda: made.state("b") == "ready")
            assert (await made.scored(capture(model="b")))["scored"] == 2


async def test_profiles_are_for_the_named_model_else_the_first_that_is_matched(tmp_path: Path) -> None:
    upstream = FakeVllm(model="a", others=(FakeVllm(model="b"),))
    async with running(FakeVllm()) as first, running(FakeVllm()) as second:
        models = {"a": "fake", "b": {"model": "fake", "url": second.url}}
        given = {"url": first.url, "models": models}
        async with bench(tmp_path, upstream, given, calibration={"model": "b"}) as made:
            await until(lambda: made.one.profile_manager.serving.model == ServedModel("b", VOCAB))
        first.vocab_size = 500
        async with bench(tmp_path, upstream, given) as made:
            await until(lambda: made.one.profile_manager.serving.model == ServedModel("b", VOCAB))
            first.vocab_size = VOCAB
            await until(lambda: made.state("a") == "ready")
            assert made.one.monitor.served.calibrated_name == "b", "it does not change while it is matched"
        first.api_key = "k"  # its reference does not answer yet
        async with bench(tmp_path, upstream, given) as made:
            await until(lambda: (made.state("a"), made.state("b")) == ("down", "ready"))
            assert made.one.profile_manager.serving.model is None, "the first one is waited for"
            first.api_key = None
            await until(lambda: made.one.profile_manager.serving.model == ServedModel("a", VOCAB))
            await asyncio.sleep(0)


async def test_adapters_of_hemostat_s_own_are_no_models(tmp_path: Path) -> None:
    own = FakeLora()
    own.names = {"0123456789abcdef" * 2: "/folder", "sql": "/sql"}
    upstream = FakeVllm(model="a", aliases=("also-a",), root="/models", lora=own)
    for enabled, unscorable in ((True, {"sql"}), (False, {"sql", *own.names})):
        adapter = {"adapter": {"enabled": True}} if enabled else {}
        async with running(FakeVllm()) as first, bench(tmp_path, upstream, {"url": first.url}, **adapter) as made:
            await until(lambda: made.one.monitor.ready)
            await until(lambda: made.told[-1].base_models == {"a", "also-a"})
            told = made.told[-1]
            assert told.unscorable_models == unscorable
            assert (told.answered_name, told.adapter_names, told.adapters) == ("a", enabled, frozenset())
