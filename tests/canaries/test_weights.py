"""Checksums of the engines' weights in the control process: when they are asked for, what is compared and said."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.canary_world import World, control_process, world
from tests.support.fake_vllm import FakeVllm

from hemostat.canaries import weights
from hemostat.canaries.pace import HOUR_SECONDS
from hemostat.canaries.replay import FIRST_SECONDS
from hemostat.canaries.weights import DAY_SECONDS, RETRY_SECONDS
from hemostat.engines.messages import ChecksumMessage
from hemostat.metrics import names
from hemostat_calibration.canary_weights import BUSY

pytestmark = pytest.mark.usefixtures("without_variants", "quick")


class Memory:
    """The weights in an engine's memory, and its plugin's answers about them."""

    def __init__(self, fake: FakeVllm, bench: World) -> None:
        self.tensors = {f"layer {n}": f"{n:032x}" for n in (2, 10, 1)}
        self.facts = {"tensor parallel size": "1"}
        self.detail = ""
        self.asked = 0
        self.bench = bench
        fake.plugin, fake.on_checksums = True, self._answer

    def _answer(self, nonce: str) -> None:
        self.asked += 1
        digests = {} if self.detail else dict(self.tensors)
        self.bench.registry.checksums[nonce] = ChecksumMessage(nonce, digests, self.facts, 0.5, self.detail)


def changed(bench: World) -> list[float]:
    return [value for key, value in bench.sample(names.CANARY_CHANGED).items() if key[2] == "weights"]


async def test_the_first_tensor_that_differs_is_named_after_a_day_and_until_it_is_as_it_was(tmp_path: Path) -> None:
    fake = FakeVllm()
    async with world(tmp_path, fake, weights=True) as bench:
        memory = Memory(fake, bench)
        await bench.settle(FIRST_SECONDS)
        assert memory.asked == 1
        memory.tensors |= {"layer 10": "f" * 32, "layer 1": "e" * 32}
        await bench.settle(DAY_SECONDS - 60.0)
        assert (memory.asked, changed(bench)) == (1, [0.0])
        await bench.settle(60.0)
        (text,) = bench.statements()
        assert f"Canaries: {bench.names[0]} (fake) has other weights in its memory, since" in text
        assert f"2 of 3 tensors differ from those of {bench.names[0]} at" in text
        assert text.endswith("the first one is layer 10")
        assert changed(bench) == [1.0]
        assert bench.canaries.report()["weights"][bench.names[0]]["detail"].startswith("1 of 3 tensors are equal to")
        later = bench.again()
        memory.bench = later
        async with control_process(later, bench.now):
            assert later.statements() == [text]
            await later.settle()
            assert later.statements() == [text]
            memory.tensors |= {"layer 10": f"{10:032x}", "layer 1": f"{1:032x}"}
            await later.settle(DAY_SECONDS)
            assert later.statements() == []
            assert later.written.events(1)[0]["why"].endswith("has the weights of then")


async def test_an_engine_is_compared_with_others_of_equal_parallelism_and_kernels(tmp_path: Path) -> None:
    fakes = [FakeVllm(), FakeVllm(), FakeVllm()]
    async with world(tmp_path, *fakes, weights=True) as bench:
        first, second, third = (Memory(fake, bench) for fake in fakes)
        second.tensors["layer 2"] = "f" * 32
        third.tensors, third.facts = {"layer 2": "0" * 32}, {"tensor parallel size": "2"}
        await bench.settle(FIRST_SECONDS)
        await bench.settle(RETRY_SECONDS)
        assert (first.asked, second.asked, third.asked) == (1, 1, 1)
        (text,) = bench.statements()
        assert "1 of 3 tensors differ from those of " in text
        assert text.endswith("the first one is layer 2")
        bench.canaries.accept()
        await bench.settle(FIRST_SECONDS)
        assert {each.asked for each in (first, second, third)} == {2}


async def test_a_change_of_the_canaries_asks_at_once_and_a_busy_engine_is_asked_again(tmp_path: Path) -> None:
    fake = FakeVllm()
    async with world(tmp_path, fake, weights=True) as bench:
        memory = Memory(fake, bench)
        await bench.settle(FIRST_SECONDS)
        fake.noise = 0.3
        await bench.settle(HOUR_SECONDS)
        assert memory.asked == 2
        await bench.settle(HOUR_SECONDS)
        assert memory.asked == 2, "once for each statement"
        memory.detail = BUSY
        await bench.settle(DAY_SECONDS)
        assert memory.asked == 3
        assert bench.canaries.report()["weights"][bench.names[0]]["detail"] == f"no checksums: {BUSY}"
        memory.detail = ""
        await bench.settle(RETRY_SECONDS)
        assert memory.asked == 4


async def test_nothing_is_asked_under_load_or_without_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeVllm()
    async with world(tmp_path, fake) as bench:
        memory = Memory(fake, bench)
        await bench.settle(FIRST_SECONDS)
        assert (memory.asked, bench.canaries.report()["weights"], changed(bench)) == (0, {}, [])
    async with world(tmp_path, fake, weights=True) as bench:
        memory = Memory(fake, bench)
        bench.outstanding[bench.names[0]] = 1
        await bench.settle(FIRST_SECONDS)
        assert memory.asked == 0


async def test_an_engine_whose_plugin_sends_none_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "TICK_SECONDS", 0.001)
    monkeypatch.setattr(weights, "MAX_SECONDS", 0.02)
    fake = FakeVllm()
    async with world(tmp_path, fake, weights=True) as bench:
        await bench.settle(FIRST_SECONDS)
        detail = bench.canaries.report()["weights"][bench.names[0]]["detail"]
        assert detail == "no checksums: the engine's plugin has sent no checksums"

        def asked() -> int:
            return sum("hemostat_checksums" in (body.get("vllm_xargs") or {}) for body in fake.requests)

        assert asked() == 1
        await bench.settle(RETRY_SECONDS)
        assert asked() == 1
        await bench.settle(DAY_SECONDS)
        assert asked() == 2
