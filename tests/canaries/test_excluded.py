"""`upstream.outlier`: which engines get no requests because canaries state that they are outliers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.support.canary_world import control_process, world
from tests.support.engine_registry import engine_registry
from tests.support.fake_vllm import FakeVllm

from hemostat.canaries.pace import HOUR_SECONDS
from hemostat.canaries.replay import FIRST_SECONDS
from hemostat.config.models import Upstream

A, B, C, D = (f"10.0.0.{n}:8000" for n in range(1, 5))


@pytest.mark.parametrize(
    ("engines", "outliers", "excluded"),
    [
        ((A,), {A}, set()),
        ((A, B), {A}, {A}),
        ((A, B), {A, B}, set()),
        ((A, B, C), {A}, {A}),
        ((A, B, C), {A, B}, set()),
        ((A, B, C, D), {A, B}, {A, B}),
        ((A, B, C, D), {A, B, C, D}, set()),
        ((B, C), {A}, set()),
    ],
)
def test_neither_the_last_engine_nor_both_of_two_are_excluded(
    engines: tuple[str, ...], outliers: set[str], excluded: set[str]
) -> None:
    urls = [f"http://{name}" for name in (A, B, C, D)]
    registry = engine_registry(Upstream(urls=urls, outlier="exclude"), lambda: engines)
    registry.outliers = frozenset(outliers)
    assert registry.excluded == excluded
    only_said = engine_registry(Upstream(urls=urls), lambda: engines)
    only_said.outliers = frozenset(outliers)
    assert not only_said.excluded


def test_drained_engines_do_not_count_as_ones_that_are_left() -> None:
    registry = engine_registry(Upstream(urls=[f"http://{A}", f"http://{B}"], outlier="exclude"), lambda: (A, B))
    registry.outliers = frozenset({A})
    assert registry.excluded == {A}
    registry.drain(B)
    assert not registry.excluded, "it is the last one"


@pytest.mark.usefixtures("without_variants", "quick")
async def test_the_engine_that_has_changed_is_excluded_until_it_is_as_it_was(tmp_path: Path) -> None:
    fakes: list[Any] = [FakeVllm(), FakeVllm()]
    async with world(tmp_path, *fakes, upstream={"outlier": "exclude"}) as bench:
        await bench.settle(FIRST_SECONDS)
        assert not bench.engines.excluded
        fakes[1].noise = 0.3
        await bench.settle(HOUR_SECONDS)
        await bench.settle(1)
        assert bench.engines.excluded == {bench.names[1]}, "of two that differ, the one that has changed"
        async with control_process(bench.again(), bench.now) as later:
            await later.settle(1)
            fakes[1].noise = 0.0
            await later.settle(HOUR_SECONDS)
            await later.settle(HOUR_SECONDS)
            assert not later.engines.excluded
