"""The process that rebuilds grammars: it is started when it is needed, bounded, and started again after a pause."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.waiting import until

from hemostat.config import schema
from hemostat.config.grammar import Grammar
from hemostat.openai.grammar_spec import GrammarOrigin, GrammarSpec
from hemostat.shadow.grammar import masks as masks_module
from hemostat.shadow.grammar.masks import GrammarMasks, Tokenizer, unavailable
from hemostat.shadow.grammar.reasons import GrammarFailure, GrammarReason

HERE = Tokenizer(Path("/nowhere"), 9)
OUTPUT = np.array([0, 2], np.int32)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def masks(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[GrammarMasks]:
    monkeypatch.setattr(masks_module, "WORKER", "tests.support.fake_grammar_worker")
    made = GrammarMasks(Grammar(seconds=30.0), clock)
    yield made
    await made.close()


def doing(what: str) -> GrammarSpec:
    return GrammarSpec(GrammarOrigin.STRUCTURED_OUTPUT, {"what": what.encode()})


async def reason(masks: GrammarMasks, what: str, tokenizer: Tokenizer = HERE) -> GrammarReason:
    with pytest.raises(GrammarFailure) as failure:
        await masks.sets(doing(what), OUTPUT, 0, tokenizer)
    return failure.value.reason


async def test_it_is_started_by_the_first_capture_and_used_by_all(masks: GrammarMasks) -> None:
    assert masks._worker is None
    assert not masks.ready(HERE)
    await until(lambda: masks.ready(HERE))
    found = await asyncio.gather(*(masks.sets(doing("sets"), OUTPUT, 0, HERE) for _ in range(5)))
    assert all(sets.support.tolist() == [2, 2] for sets in found)
    other = Tokenizer(Path("/elsewhere"), 9)
    assert not masks.ready(other)
    await until(lambda: masks.ready(other))
    assert masks.ready(HERE)
    assert (await masks.sets(doing("sets"), OUTPUT, 0, other)).tokens == 2


async def test_what_xgrammar_refuses_ends_one_capture(masks: GrammarMasks) -> None:
    await until(lambda: masks.ready(HERE))
    assert await reason(masks, "refuse") is GrammarReason.REFUSED
    assert masks.ready(HERE)
    assert await reason(masks, "other") is GrammarReason.FAILED
    assert await reason(masks, "a set without an id") is GrammarReason.FAILED
    assert (await masks.sets(doing("sets"), OUTPUT, 0, HERE)).tokens == 2


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("die", GrammarReason.FAILED),
        ("bad_alloc", GrammarReason.MEMORY),
        ("garbage", GrammarReason.FAILED),
        ("hang", GrammarReason.TIMEOUT),
    ],
)
async def test_a_grammar_that_ends_the_process_is_not_tried_again(
    masks: GrammarMasks, clock: Clock, what: str, expected: GrammarReason, monkeypatch: pytest.MonkeyPatch
) -> None:
    await until(lambda: masks.ready(HERE))
    if what == "hang":
        monkeypatch.setattr(masks, "_settings", Grammar(seconds=0.05))
    assert await reason(masks, what) is expected
    monkeypatch.setattr(masks, "_settings", Grammar(seconds=30.0))
    # Until the pause is over, captures are skipped at once.
    assert masks.ready(HERE)
    assert await reason(masks, "sets") is expected
    clock.now += 60.0
    assert not masks.ready(HERE)
    await until(lambda: masks.ready(HERE))
    assert (await masks.sets(doing("sets"), OUTPUT, 0, HERE)).tokens == 2
    worker = masks._worker
    assert await reason(masks, what) is expected
    assert masks._worker is worker, "it was not asked"
    clock.now += 600.0
    assert (await masks.sets(doing("sets"), OUTPUT, 0, HERE)).tokens == 2
    if what == "hang":
        monkeypatch.setattr(masks, "_settings", Grammar(seconds=0.05))
    assert await reason(masks, what) is expected
    assert masks._worker is None, "it was tried again"


async def test_a_tokenizer_that_is_missing_is_tried_again_later(masks: GrammarMasks, clock: Clock) -> None:
    missing = Tokenizer(Path("/missing"), 9)
    await until(lambda: masks.ready(missing))
    assert await reason(masks, "sets", missing) is GrammarReason.NO_TOKENIZER
    clock.now += 60.0
    assert not masks.ready(missing)


async def test_a_tokenizer_that_is_missing_is_no_other_models_concern(masks: GrammarMasks) -> None:
    missing = Tokenizer(Path("/missing"), 9)
    await until(lambda: masks.ready(HERE))
    worker = masks._worker
    await until(lambda: masks.ready(missing))
    for _ in range(3):
        assert masks.ready(missing)
        assert await reason(masks, "sets", missing) is GrammarReason.NO_TOKENIZER
        assert (await masks.sets(doing("sets"), OUTPUT, 0, HERE)).tokens == 2
    assert masks._worker is worker


async def test_tokenizers_are_as_many_as_models_and_none_is_given_up_for_another(
    masks: GrammarMasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert masks_module.MAX_TOKENIZERS == schema.MAX_MODELS
    monkeypatch.setattr(masks_module, "MAX_TOKENIZERS", 2)
    all_of_them = [Tokenizer(Path(f"/{n}"), 9) for n in range(3)]
    for one in all_of_them:
        await until(lambda one=one: masks.ready(one))  # type: ignore[misc]
    assert await reason(masks, "sets", all_of_them[2]) is GrammarReason.NO_TOKENIZER
    for one in all_of_them[:2]:
        assert masks.ready(one)
        assert (await masks.sets(doing("sets"), OUTPUT, 0, one)).tokens == 2


async def test_who_waits_behind_a_grammar_that_hangs_is_not_taken_for_hopeless(
    masks: GrammarMasks, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    await until(lambda: masks.ready(HERE))
    monkeypatch.setattr(masks, "_settings", Grammar(seconds=0.05))
    found = await asyncio.gather(reason(masks, "hang"), reason(masks, "sets"), reason(masks, "refuse"))
    assert found == [GrammarReason.TIMEOUT, GrammarReason.NOT_READY, GrammarReason.NOT_READY]
    monkeypatch.setattr(masks, "_settings", Grammar(seconds=30.0))
    clock.now += 60.0
    await until(lambda: masks.ready(HERE))
    assert (await masks.sets(doing("sets"), OUTPUT, 0, HERE)).tokens == 2


async def test_a_killed_process_is_started_again(masks: GrammarMasks, clock: Clock) -> None:
    await until(lambda: masks.ready(HERE))
    worker: Any = masks._worker
    os.kill(worker._child._process.pid, signal.SIGKILL)
    await until(lambda: worker.exited)
    assert masks.ready(HERE)
    assert await reason(masks, "sets") is GrammarReason.FAILED
    clock.now += 60.0
    masks.ready(HERE)
    await until(lambda: masks.ready(HERE))
    assert (await masks.sets(doing("sets"), OUTPUT, 0, HERE)).tokens == 2


async def test_closing_ends_the_process_and_what_waits_for_it(masks: GrammarMasks) -> None:
    await until(lambda: masks.ready(HERE))
    worker: Any = masks._worker
    waiting = asyncio.create_task(masks.sets(doing("hang"), OUTPUT, 0, HERE))
    await asyncio.sleep(0.01)
    await masks.close()
    with pytest.raises(GrammarFailure):
        await waiting
    assert worker.exited
    assert masks.ready(HERE)
    assert await reason(masks, "sets") is GrammarReason.NOT_READY


def test_why_grammars_cannot_be_rebuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "enabled" in unavailable(Grammar(enabled=False))
    assert "guidance" in unavailable(Grammar(backend="guidance"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "hemostat[grammar]" in unavailable(Grammar())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is limited on Linux only")
async def test_the_real_process_compiles_within_its_limits(tmp_path: Path, clock: Clock) -> None:
    pytest.importorskip("xgrammar")
    tokenizer = Tokenizer(tmp_path, write_tokenizer(tmp_path))
    masks = GrammarMasks(Grammar(seconds=6.0, memory_mib=64), clock)
    try:
        await until(lambda: masks.ready(tokenizer), 240.0)
        yes = GrammarSpec(GrammarOrigin.STRUCTURED_OUTPUT, {"structured_outputs": b'{"choice": ["yes"]}'})
        from transformers import AutoTokenizer

        loaded: Any = AutoTokenizer.from_pretrained(str(tmp_path))
        output = np.array([*loaded.encode("yes"), loaded.eos_token_id], np.int32)
        found = await masks.sets(yes, output, 0, tokenizer)
        assert found.contains(output[:, None]).all()
        assert found.support[-1] == 1
        # 60 kB of alternatives, of which a state machine takes more than the memory that is allowed.
        keys = {f"key{n}": {"type": "string", "pattern": f"(a|b{n}){{1,400}}"} for n in range(500)}
        large = json.dumps({"json": {"type": "object", "properties": keys}}).encode()
        spec = GrammarSpec(GrammarOrigin.STRUCTURED_OUTPUT, {"structured_outputs": large})
        with pytest.raises(GrammarFailure) as failure:
            await masks.sets(spec, output, 0, tokenizer)
        assert failure.value.reason in {GrammarReason.MEMORY, GrammarReason.FAILED, GrammarReason.TIMEOUT}
        clock.now += 60.0
        await until(lambda: masks.ready(tokenizer), 240.0)
        assert (await masks.sets(yes, output, 0, tokenizer)).tokens == 2
    finally:
        await masks.close()
