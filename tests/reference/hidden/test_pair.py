"""A pooling server as the reference of a served model: what `hemostat check` says, and whether the two fit."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tests.support.fake_vllm import FakeVllm, running
from tests.support.fake_vllm.pooling import FakePooling

from hemostat.commands.setup_check import check, table
from hemostat.config.models import Upstream
from hemostat.config.schema import Settings
from hemostat.reference import match as match_module
from hemostat.reference.hidden.pooling import POOLING_FLAGS
from hemostat.reference.hidden.probe import TEXT
from hemostat.reference.match import compare
from hemostat.reference.monitor import ReferenceMonitor
from hemostat.reference.on_server import ServerReference
from hemostat.reference.pair import ReferenceState
from hemostat.reference.references import make_references

REFERENCE_LINE = re.compile(r"\S+ +reference  ")


class Compressed(FakeVllm):
    """A generating server with the distributions of a pooling one."""

    known = FakePooling(TEXT)

    def logprobs(self, context: list[int], adapter: str | None = None) -> npt.NDArray[np.float64]:
        # Its states depend on the last four ids.
        return self.known.logprobs(context[-4:])[-1].astype(np.float32).astype(np.float64)


@pytest.fixture(autouse=True)
def without_torch(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """See test_pooling_reference.py."""
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(
        "import importlib.util as u\n_find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'torch' else _find(name, *rest)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{site}:{os.environ.get('PYTHONPATH', '')}")


def settings_of(upstream: FakeVllm, reference: FakeVllm, folder: Path | None) -> Settings:
    return Settings.model_validate(
        {
            "upstream": {"url": upstream.url},
            "reference": {"backend": "vllm", "url": reference.url, "threads": 1}
            | ({"folder": str(folder)} if folder else {}),
            "shadow": {"top_k": 5},
            "calibration": {"mode": "off"},
        }
    )


async def test_check_says_which_figures_follow(tmp_path: Path) -> None:
    folder = FakePooling(TEXT).save(tmp_path)
    pooling = FakeVllm(model="reference", pooling=FakePooling(TEXT))
    async with running(Compressed()) as upstream, running(pooling) as reference, running(FakeVllm()) as generating:
        said = table(await check(settings_of(upstream, reference, folder)))
        (line,) = [line for line in said.splitlines() if REFERENCE_LINE.match(line)]
        assert line.startswith("ok")
        assert "exact: full vocabulary (hidden states of a pooling server)" in line
        assert "same ids of a probe text" in said
        said = table(await check(settings_of(upstream, generating, folder)))
        (at,) = [n for n, line in enumerate(said.splitlines()) if REFERENCE_LINE.match(line)]
        assert "bounds: top ids only" in said.splitlines()[at]
        assert POOLING_FLAGS in said.splitlines()[at + 1]
        said = table(await check(settings_of(upstream, reference, None)))
        (line,) = [line for line in said.splitlines() if REFERENCE_LINE.match(line)]
        assert line.startswith("NO")
        assert "reference.folder" in line


async def test_the_monitor_is_ready_with_one_line_in_the_log(tmp_path: Path) -> None:
    folder = FakePooling(TEXT).save(tmp_path)
    pooling = FakeVllm(model="reference", pooling=FakePooling(TEXT))
    async with running(Compressed()) as upstream, running(pooling) as reference:
        settings = settings_of(upstream, reference, folder)
        references = make_references(settings)
        changed = asyncio.Event()
        monitor = ReferenceMonitor(
            references,
            settings,
            compressed_scorer=None,
            scores_fail=lambda name: False,
            refused=lambda: 0.0,
        )
        monitor.on_change = changed.set
        running_monitor = asyncio.create_task(monitor.run())
        try:
            async with asyncio.timeout(60):
                while monitor.state is not ReferenceState.READY:
                    await changed.wait()
                    changed.clear()
            assert monitor.detail == "reference (server), exact: full vocabulary (hidden states of a pooling server)"
        finally:
            running_monitor.cancel()
            await asyncio.gather(running_monitor, return_exceptions=True)
            assert references is not None
            await references.close()


@pytest.mark.parametrize(("factor", "ok"), [(1.0, True), (0.8, False)])
async def test_a_reference_that_knows_less_than_its_compressed_copy_is_none(
    factor: float, ok: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as an embedding that the probe alone does not tell from the right one. Here it costs 0.2 nats more."""
    monkeypatch.setattr(match_module, "MAX_LESS_LIKELY_NATS", 0.1)
    model = FakePooling(TEXT)
    model.weight *= np.float32(factor)
    pooling = FakeVllm(model="reference", pooling=FakePooling(TEXT))
    async with running(Compressed()) as upstream, running(pooling) as server:
        reference: Any = ServerReference(server.url, folder=model.save(tmp_path), threads=1)
        try:
            match = await compare(Upstream(url=upstream.url), reference)
            assert (match.ok, match.compared) == (ok, True), match.detail
            assert ok or "correct reference.folder" in match.detail
        finally:
            await reference.close()
