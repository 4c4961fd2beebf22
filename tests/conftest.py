"""What several test folders share: the two checkpoints, and one real vLLM server for the whole run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from tests.support.engine_admin import TOKEN, EngineAdmin
from tests.support.running_vllm import RunningVllm
from xdist.scheduler.loadscope import LoadScopeScheduling

from hemostat.models import vllm_server as vllm_process
from hemostat.models.reference_checkpoint import Checkpoints, cached_checkpoints

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("hemostat", deadline=None)
hypothesis.settings.load_profile("hemostat")

VLLM_ARGUMENTS = [
    *("--enforce-eager", "--dtype", vllm_process.dtype(), "--max-model-len", "2048", "--max-logprobs", "64"),
    *("--no-enable-prefix-caching", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    *("--logits-processors", vllm_process.LOGITS_PROCESSOR),
]

_missed: list[str] = []
"""Tests that were skipped for want of something that could be installed: their reason says how."""


@pytest.fixture(scope="session")
def checkpoints() -> Checkpoints:
    """SmolLM2-135M-Instruct: `.reference`, `.compressed` W4A16; cached between runs."""
    return cached_checkpoints("w4a16", print)


@pytest.fixture(scope="session")
def vllm_server(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningVllm]:
    folder = tmp_path_factory.mktemp("vllm")
    profile_dir = folder / "profiles"
    profile_dir.mkdir()
    admin = EngineAdmin()
    environment = {
        "HEMOSTAT_PROFILE_DIR": str(profile_dir),
        "HEMOSTAT_ADMIN_URL": admin.url,
        "HEMOSTAT_ADMIN_TOKEN": TOKEN,
    }
    server = vllm_process.VllmServer(
        checkpoints.compressed, "smollm2", folder / "vllm.log", VLLM_ARGUMENTS, environment
    )
    try:
        server.start()
        server.wait_ready(600.0, progress=print)
        yield RunningVllm(server.url, server.model, profile_dir, server.log, admin)
    finally:
        server.stop()
        admin.close()


def pytest_configure() -> None:
    """Each of `-n 2` processes has its servers compute on a processor of its own, where vLLM would take the first."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None:
        processor = int(worker.removeprefix("gw")) % (os.cpu_count() or 1)
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(processor))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return _Together(config, log)


class _Together(LoadScopeScheduling):
    """With `-n 2`, all tests of a file run in one process, and so do all files that share the server."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "vllm_server" if _shares_server(self.config.rootpath / file) else file


@cache
def _shares_server(file: Path) -> bool:
    """A test or fixture of the file has the fixture `vllm_server` as parameter (the module of that name is another)."""
    return re.search(r"\bvllm_server\s*[:,)]", file.read_text(encoding="utf-8")) is not None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, and only these")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = bool(config.getoption("--slow"))
    deselected = [item for item in items if (item.get_closest_marker("slow") is not None) != chosen]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if (item.get_closest_marker("slow") is not None) == chosen]
    if not vllm_process.installed():
        skip = pytest.mark.skip(reason="vLLM is not installed here: `make setup` installs it")
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(skip)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and (isinstance(report.longrepr, tuple) and "install" in report.longrepr[2]):
        _missed.append(f"{report.nodeid} ({report.longrepr[2]})")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where everything must run (REQUIRE_ALL=1, as in CI), a test that is skipped because something is not installed
    fails the run."""
    if os.environ.get("REQUIRE_ALL") == "1" and _missed:
        print("\nREQUIRE_ALL=1, but these were skipped:", *_missed, sep="\n  ")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
