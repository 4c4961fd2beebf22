"""What several test folders share: the two checkpoints, and the real vLLM servers for the whole run."""

from __future__ import annotations

import gc
import os
import re
import ssl
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from httpx._transports import default as httpx_transports
from tests.support import (
    compiled,
    slow,
    temperature_bias,  # noqa: F401  registers the family that only tests have, also where a file runs alone
)
from tests.support.minutes import Minutes
from tests.support.running_vllm import (
    CLIENT_HEADERS_ARGUMENTS,
    LORA_ARGUMENTS,
    LORA_ENVIRONMENT,
    RAISING_ARGUMENTS,
    RunningVllm,
    running_vllm,
)
from xdist.scheduler.loadscope import LoadScopeScheduling

from hemostat_lab.demo import vllm_server as vllm_process
from hemostat_lab.demo.checkpoints import Checkpoints, cached_checkpoints

_LONGEST = [
    Path(__file__).parent / name
    for name in (
        "deploy/test_compiled_wheel.py",
        "e2e/test_demo.py",
        "control/test_adapters.py",
        "control/test_restarts.py",
        "e2e/test_adapter_by_hand.py",
        "adapters/live/test_judge.py",
        "reference/test_transformers.py",
    )
]
"""Files of a minute or more each, apart from those that share a server."""
assert all(file.is_file() for file in _LONGEST), "one of them is gone"
_missed: list[str] = []
"""Tests that were skipped for want of something that could be installed: their reason says how."""

_THREADS_BEFORE = pytest.StashKey[int]()


@pytest.fixture(scope="session")
def checkpoints() -> Checkpoints:
    """SmolLM2-135M-Instruct: `.reference`, `.compressed` W4A16; cached between runs."""
    return cached_checkpoints("w4a16", print)


@pytest.fixture(scope="session")
def vllm_server(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningVllm]:
    with running_vllm(checkpoints, tmp_path_factory.mktemp("vllm"), RAISING_ARGUMENTS) as server:
        yield server


@pytest.fixture(scope="session")
def lora_server(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningVllm]:
    """The same with adapters: two slots, rank 16. A test unloads the adapters that it has loaded. Passive mode reads
    the headers of clients on it."""
    arguments = [*LORA_ARGUMENTS, *CLIENT_HEADERS_ARGUMENTS]
    with running_vllm(checkpoints, tmp_path_factory.mktemp("lora"), arguments, LORA_ENVIRONMENT) as server:
        yield server


def _reuse_authorities() -> None:
    """Clients of httpx share what it makes of the list of public authorities: to read it takes 10 to 20 ms, and tests
    make some ten thousand clients. The environment of the run may name the list; a test that names another gets it."""
    create = httpx_transports.create_ssl_context
    by_default = cache(create)

    def named() -> list[str | None]:
        return [os.environ.get(name) for name in ("SSL_CERT_FILE", "SSL_CERT_DIR")]

    of_the_run = named()

    def shared(**given: Any) -> ssl.SSLContext:
        own = {name: given[name] for name in ("verify", "cert")} != {"verify": True, "cert": None}
        return (create if own or named() != of_the_run else by_default)(**given)

    httpx_transports.create_ssl_context = shared  # type: ignore[assignment]


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Minutes(), "minutes")
    _reuse_authorities()
    if config.getoption("--slow"):
        slow.draw(1)
    elif config.getoption("--compiled"):
        slow.draw(10)  # the same properties are drawn from the sources, too
    # How long an example takes, and how fast examples are drawn, depend on what else the machine does.
    hypothesis.settings.register_profile(
        "hemostat",
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
        max_examples=slow.examples(100),
    )
    hypothesis.settings.load_profile("hemostat")
    # The servers of each process of `-n` compute on one processor, the next one, where vLLM would take the first.
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None:
        processor = int(worker.removeprefix("gw")) % (os.cpu_count() or 1)
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(processor))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """About a million objects are made that stay: looking for garbage among them finds nothing, now and later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # what Triton binds says at the end of the process that it was not collected


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return _Together(config, log)


class _Together(LoadScopeScheduling):
    """With `-n`, all tests of a file run in one process, and so do all files that share a server."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return _shared_fixture(self.config.rootpath / file) or file


@cache
def _shared_fixture(file: Path) -> str | None:
    """What a test or fixture of the file has as parameter that takes long to make (the module `vllm_server` is
    another)."""
    match = re.search(r"\b(vllm_server|lora_server)\s*[:,)]", file.read_text(encoding="utf-8"))
    return match and match[1]


@cache
def _order(file: Path) -> int:
    if _shared_fixture(file) is not None:
        return 0
    return 1 + _LONGEST.index(file) if file in _LONGEST else 1 + len(_LONGEST)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow", action="store_true", help="run the tests marked slow and those of properties, and only these"
    )
    parser.addoption("--compiled", action="store_true", help="fail unless the relay's hot path is compiled")


def _runs(item: pytest.Item) -> set[bool]:
    """Without `--slow`, with it: a property is tested with a part of its examples, and with all of them."""
    if item.get_closest_marker("slow") is not None:
        return {True}
    return {False, True} if getattr(getattr(item, "obj", None), "is_hypothesis_test", False) else {False}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = bool(config.getoption("--slow"))
    deselected = [item for item in items if chosen not in _runs(item)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if chosen in _runs(item)]
    if "PYTEST_XDIST_WORKER" in os.environ:
        # What takes longest in one process begins first, so that no process waits for it in the end.
        items.sort(key=lambda item: _order(item.path))
    if config.getoption("--compiled") and (interpreted := compiled.not_compiled()):
        raise pytest.UsageError(f"not compiled: {', '.join(interpreted)}")
    if compiled.is_compiled("hemostat.relay.exchange"):
        skip = pytest.mark.skip(reason="it replaces a method of a compiled class")
        for item in items:
            if item.get_closest_marker("interpreted"):
                item.add_marker(skip)
    if not vllm_process.installed():
        skip = pytest.mark.skip(reason="vLLM is not installed here: `make setup` installs it")
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(skip)


def _torch_threads() -> int:
    """Returns how many threads torch computes with in this process; 0 if it is not imported."""
    count = getattr(sys.modules.get("torch"), "get_num_threads", None)
    return 0 if count is None else int(count())


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[_THREADS_BEFORE] = _torch_threads()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """A test that leaves torch with more threads slows down every later one of its process that computes with torch:
    the threads wait for each other in every small matrix product. Such a test fails."""
    yield
    before, after = item.stash.get(_THREADS_BEFORE, 0), _torch_threads()
    if 0 < before < after:
        sys.modules["torch"].set_num_threads(before)
        pytest.fail(f"it left torch with {after} threads in place of {before}", pytrace=False)


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
