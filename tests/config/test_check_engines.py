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


@pytest.mark.parametrize("version", ["0.1.7", ""])
async def test_an_engine_whose_plugin_has_a_version_that_does_not_fit_is_named(version: str) -> None:
    said = await finding(plugin=True, plugin_version=version)
    assert said.state is State.NOTE
    assert f"its version is {version or 'unknown (older than 0.3)'} and does not fit Hemostat " in said.detail
    assert "./calibration" in said.fix
    assert (await finding(plugin=True)).state is State.OK


async def test_an_engine_that_does_not_answer_is_named() -> None:
    async with running(FakeVllm()) as engine:
        result = await check(Settings.model_validate({"upstream": {"urls": [engine.url, "http://127.0.0.1:9"]}}))
    (said,) = [finding for finding in result if finding.what == "engine http://127.0.0.1:9"]
    assert said.state is State.NO
    assert "upstream.urls" in said.fix
