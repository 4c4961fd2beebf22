"""The variants of the canaries' tokens against a fake vLLM, and `hemostat canaries cause`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from tests.support.fake_vllm import FakeVllm, running, serving

from hemostat.canaries import client, variants
from hemostat.canaries.variants import VariantClient, cost
from hemostat.cli import main
from hemostat.commands.canaries import CHANGED, COULD_NOT_TELL, EQUAL
from hemostat.reference.server import VllmServer
from hemostat_calibration import canary_cause
from hemostat_calibration.canaries import TOLERANCE_NATS, Canary, CanarySet
from hemostat_calibration.canary_cause import MIN_TEXT, Cause, CauseBaseline, Variant

T = TypeVar("T")

PROMPTS = "".join(f"prompt {n}\n" for n in range(20))


async def at_once() -> None:
    """A gate that is open."""


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a fake, a short text is enough."""
    monkeypatch.setattr(canary_cause, "MAX_TEXT", MIN_TEXT)
    monkeypatch.setattr(client, "ANSWER_TOKENS", 6)


def model(**more: Any) -> FakeVllm:
    """Companions, which have more tokens than anything else, do not end."""
    return FakeVllm(**{"plugin": True, "hold_after": variants.COMPANION_TOKENS // 2} | more)


async def asked(fake: FakeVllm, ask: Callable[[VariantClient], Awaitable[T]]) -> T:
    async with running(fake):
        server = VllmServer(fake.url)
        try:
            return await ask(VariantClient(server, fake.model, at_once))
        finally:
            await server.close()


@pytest.fixture(scope="module")
def taken() -> tuple[CauseBaseline, list[dict[str, Any]]]:
    """A baseline, and the requests for it."""
    fake, sequence = model(), np.arange(1, 100, dtype=np.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canary_cause, "MAX_TEXT", MIN_TEXT)
        canaries = [Canary("", sequence, sequence[:9])] * 16
        baseline = asyncio.run(asked(fake, lambda client: client.baseline(canaries, fake.max_model_len)))
    assert baseline is not None
    return baseline, fake.requests


def test_forced_tokens_have_the_log_probabilities_of_a_prefill(
    taken: tuple[CauseBaseline, list[dict[str, Any]]],
) -> None:
    baseline, requests = taken
    for replay in baseline.measured:
        assert replay.scores.keys() == set(Variant)
        assert replay.precision == 9.4
        expected = canary_cause.decoded_part(replay.scores[Variant.LONG], len(baseline.text))
        for variant in canary_cause.DECODING:
            assert np.allclose(replay.scores[variant], expected, atol=1e-6)
    salts = [body["cache_salt"] for body in requests if "hemostat_force" in (body.get("vllm_xargs") or {})]
    assert salts[:2] == salts[2:4]  # what is cached is asked with the salt of what is not
    assert len(set(salts)) == 2 * 4
    spent = sum(len(body["prompt"]) + body["max_tokens"] for body in requests)
    assert spent == 2 * cost(baseline.text)


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ({}, Cause.NONE),
        ({"noise": 0.3}, Cause.WEIGHTS),
        ({"noise": 0.3, "kv_precision": 69}, Cause.KV_CACHE),
        ({"fault": "prefix"}, Cause.PREFIX_CACHE),
        ({"fault": "batch"}, Cause.BATCH),
        ({"fault": "decoding"}, Cause.DECODING),
    ],
)
async def test_what_changes_where_says_the_cause(
    taken: tuple[CauseBaseline, list[dict[str, Any]]], fault: Mapping[str, object], cause: Cause
) -> None:
    baseline, _ = taken
    now = await asked(model(**fault), lambda client: client.measure(baseline.text))
    verdict = baseline.explain(now, TOLERANCE_NATS)
    assert verdict.cause is cause, verdict.text


@pytest.mark.parametrize("without", [{"plugin": False}, {"raw_logprobs": False}])
async def test_what_was_not_decoded_as_asked_is_not_measured(
    taken: tuple[CauseBaseline, list[dict[str, Any]]], without: Mapping[str, object]
) -> None:
    now = await asked(model(**without), lambda client: client.measure(taken[0].text))
    assert now.scores.keys() == {Variant.LONG, Variant.LONG_BESIDE, Variant.SHORT}


def once_companions_have_ended(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def waits(*arguments: Any) -> Any:
        tasks = asyncio.all_tasks()
        await asyncio.gather(*[task for task in tasks if getattr(task.get_coro(), "__name__", "") == "_complete"])
        return await method(*arguments)

    return waits


async def test_companions_that_end_early_leave_the_variant_out(
    taken: tuple[CauseBaseline, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variants, "COMPANION_TOKENS", 1)
    for name in ("_score", "_decode"):
        monkeypatch.setattr(VariantClient, name, once_companions_have_ended(getattr(VariantClient, name)))
    now = await asked(model(hold_after=None), lambda client: client.measure(taken[0].text))
    assert now.scores.keys() == {Variant.LONG, Variant.SHORT, Variant.DECODED, Variant.CACHED}


async def test_a_model_of_a_short_context_has_no_variants() -> None:
    sequences = [Canary("", np.zeros(50, np.int32), np.zeros(6, np.int32))] * 16
    assert await asked(model(), lambda client: client.baseline(sequences, 200)) is None


@pytest.fixture
def fake() -> FakeVllm:
    return model()


@pytest.fixture
def url(fake: FakeVllm) -> Iterator[str]:
    with serving(fake) as url:
        yield url


def test_the_command_says_the_cause_in_one_line(
    url: str, fake: FakeVllm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, path = tmp_path / "prompts", tmp_path / "set.json"
    prompts.write_text(PROMPTS)
    assert main(["canaries", "take", url, str(path), "--prompts", str(prompts)]) == EQUAL
    capsys.readouterr()

    def cause(*servers: str, facts: Sequence[str] = ()) -> tuple[int, str]:
        code = main(["canaries", "cause", servers[0], str(path), *servers[1:]])
        captured = capsys.readouterr()
        assert (captured.out + captured.err).count("\n") == 1 + len(facts)
        assert captured.out.splitlines()[1:] == list(facts)
        return code, captured.out

    code, text = cause(url)
    assert (code, text[:8]) == (EQUAL, "nothing:")
    with serving(model(noise=0.3)) as other:
        text = "weights or kernels: all variants have changed, with a context of at most 32 tokens by "
        assert cause(other)[1].startswith(text)
        code, text = cause(url, other)
        assert code == CHANGED
        assert text.startswith(
            f"one engine of several: {other} differs from then, 1 other does not; there weights or kernels: "
        )
    with serving(model(noise=0.3, root="/models/b")) as other:
        facts = ["  path: fake, now /models/b"]
        assert cause(other, facts=facts)[1].startswith("weights or kernels: "), "a new checkpoint has a new folder"
        text = f"one engine of several: {other} differs from then"
        assert cause(url, other, facts=[f"  {other}: {facts[0].strip()}"])[1].startswith(text)
    fake.fault = "decoding"
    code, text = cause(url)
    assert (code, text.partition(":")[0]) == (CHANGED, "prefill and decode differ")
    fake.plugin = False
    fake.noise = 0.3
    code, text = cause(url)
    assert (code, text[:8]) == (COULD_NOT_TELL, "unknown:")


def test_a_set_without_variants_is_one_line(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, path = tmp_path / "prompts", tmp_path / "set.json"
    prompts.write_text("".join(f"p{n}\n" for n in range(16)))
    assert main(["canaries", "take", url, str(path), "--prompts", str(prompts)]) == EQUAL
    assert CanarySet.from_bytes(path.read_bytes()).cause is None
    capsys.readouterr()
    assert main(["canaries", "cause", url, str(path)]) == COULD_NOT_TELL
    assert "has no variants: the model's context, or the set, is too short" in capsys.readouterr().err
