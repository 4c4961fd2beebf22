"""`hemostat check` with several engines: one that differs from the first is named."""

from __future__ import annotations

from typing import Any

import pytest
from tests.support.fake_vllm import FakeVllm, running

from hemostat.commands.setup_check import Finding, State, check
from hemostat.config.schema import Settings


async def finding(**second: Any) -> Finding:
    """What is said of the second engine."""
    async with running(FakeVllm()) as engine, running(FakeVllm(**second)) as other:
        result = await check(Settings.model_validate({"upstream": {"urls": [engine.url, other.url]}}))
        (said,) = [finding for finding in result if finding.what == f"engine {other.url}"]
        return said


async def test_an_engine_that_is_like_the_first_is_said_to_be() -> None:
    assert (await finding()).state is State.OK


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({"model": "another"}, "serves another; "),
        ({"vocab_size": 300}, "has 300 tokens there"),
        ({"api_key": "k"}, "401"),
    ],
    ids=["model", "vocabulary", "key"],
)
async def test_an_engine_that_differs_is_named(second: dict[str, Any], words: str) -> None:
    said = await finding(**second)
    assert said.state is State.NO
    assert words in said.detail
    assert said.fix


async def test_an_engine_that_does_not_answer_is_named() -> None:
    async with running(FakeVllm()) as engine:
        result = await check(Settings.model_validate({"upstream": {"urls": [engine.url, "http://127.0.0.1:9"]}}))
    (said,) = [finding for finding in result if finding.what == "engine http://127.0.0.1:9"]
    assert said.state is State.NO
    assert "upstream.urls" in said.fix
