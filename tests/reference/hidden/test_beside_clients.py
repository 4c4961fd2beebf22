"""A pooling server as the reference fails, behind `hemostat serve`: clients get what vLLM answers, and each failure is
counted."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from tests.support.fake_vllm import FakeVllm, serving
from tests.support.fake_vllm.pooling import FakePooling
from tests.support.memory import peak_mib
from tests.support.stack import Stack, hemostat, sampling_settings, wait_for

from hemostat.reference.hidden.probe import TEXT

pytestmark = pytest.mark.timeout(300)

MIB = 1 << 20
CHAT = "/v1/chat/completions"
MAX_LENGTH = 600
"""Of the reference."""
IN_ITS_PROCESSES = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else found(name, *rest)
if "hemostat.control.process" in sys.orig_argv:
    from hemostat.reference.hidden import reference
    from hemostat.reference.server import VllmServer
    reference.PROBE_SECONDS = 0.0
    VllmServer.__init__.__kwdefaults__["timeout"] = 6.0
"""
"""No torch, whose import takes seconds; every score looks whether the model is the same; and a shorter time-out."""


@dataclass
class Bench:
    stack: Stack
    upstream: str
    reference: FakeVllm
    stop_reference: Callable[[], None]
    number: int = 0

    @property
    def pooling(self) -> FakePooling:
        assert self.reference.pooling is not None
        return self.reference.pooling

    def ask(self, text: str = "Hello", streams: tuple[bool, ...] = (True, False)) -> None:
        """Through Hemostat, and the same directly: both get the same."""
        self.number += 1
        for stream in streams:
            body = {
                **{"messages": [{"role": "user", "content": f"{text} {self.number}"}], "max_tokens": 5},
                **{"temperature": 0, "stream": stream},
            }
            urls, headers = (self.stack.url, self.upstream), {"X-Request-Id": f"{self.number}"}
            asked, plain = (httpx.post(url + CHAT, json=body, headers=headers, timeout=60) for url in urls)
            assert (asked.status_code, asked.content) == (200, plain.content)

    def endings(self, outcome: str, reason: str = "") -> float:
        return self.stack.metric("hemostat_shadow_requests_total", outcome=outcome, reason=reason)

    def memory(self) -> float:
        """Most bytes that the control process has had."""
        return 2**20 * peak_mib(self.stack.process("hemostat.control.process"))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("failing")
    (folder / "sitecustomize.py").write_text(IN_ITS_PROCESSES)
    checkpoint = FakePooling(TEXT).save(folder / "checkpoint")
    pooling = FakeVllm(model="reference", pooling=FakePooling(TEXT), max_model_len=MAX_LENGTH)
    with (
        pytest.MonkeyPatch.context() as patch,
        serving(FakeVllm(seed=3)) as upstream,
        ExitStack() as of_reference,
    ):
        url = of_reference.enter_context(serving(pooling))
        patch.setenv("PYTHONPATH", f"{folder}:{os.environ.get('PYTHONPATH', '')}")
        reference = {"backend": "vllm", "url": url, "folder": str(checkpoint), "threads": 1}
        shadow = {"rate": 1.0, "top_k": 5, "floor_fraction": 0.0}
        with hemostat(sampling_settings(upstream, reference, shadow=shadow), folder / "run") as stack:
            stack.wait_scoring()
            assert "exact" in stack.status()["reference"]["detail"]
            yield Bench(stack, upstream, pooling, of_reference.close)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"status": 500}, "http_error"),
        ({"status": 503}, "busy"),
        ({"short": True}, "short_answer"),
        ({"not_finite": True}, "bad_answer"),
        ({"endless": 1024 * MIB}, "too_large"),
        ({"endless": 96 * MIB, "bomb": True}, "bad_answer"),  # packed within the time-out on a busy machine, too
        ({"revision": 1}, "revision"),
        ({"hang": True}, "timeout"),
    ],
)
def test_a_failing_reference_is_counted_and_affects_no_client(bench: Bench, fault: dict[str, Any], reason: str) -> None:
    label, had = f"reference_{reason}", bench.memory()
    before = bench.endings("dropped", label)
    for name, value in fault.items():
        setattr(bench.pooling, name, value)
    streams = (True,) if "hang" in fault else (True, False)
    bench.ask(streams=streams)
    assert "hang" not in fault or bench.endings("dropped", label) == before, "the client did not wait for it"
    wait_for(f"as many {label}", lambda: bench.endings("dropped", label) == before + len(streams))
    assert bench.memory() < had + 64 * MIB
    for name in fault:
        setattr(bench.pooling, name, getattr(FakePooling, name))
    scored = bench.endings("scored")
    bench.ask()
    wait_for("scores again", lambda: bench.endings("scored") == scored + 2)


def test_another_model_behind_the_address_is_counted(bench: Bench) -> None:
    before, scored = bench.endings("dropped", "reference_http_error"), bench.endings("scored")
    bench.reference.model = "other"
    bench.ask()
    wait_for("two that failed", lambda: bench.endings("dropped", "reference_http_error") == before + 2)
    bench.reference.model = "reference"
    bench.ask()
    wait_for("scores again", lambda: bench.endings("scored") == scored + 2)


def test_a_prompt_that_is_too_long_for_it_is_skipped(bench: Bench) -> None:
    before, scored = bench.endings("skipped", "reference_too_long"), bench.endings("scored")
    bench.ask("a" * MAX_LENGTH)
    wait_for("two skipped", lambda: bench.endings("skipped", "reference_too_long") == before + 2)
    assert bench.endings("scored") == scored
    assert bench.stack.status()["reference"]["state"] == "ready"


def test_a_reference_that_is_gone_is_counted(bench: Bench) -> None:
    """The last one: it does not come back."""
    before = bench.endings("dropped", "reference_down")
    bench.stop_reference()
    bench.ask()
    wait_for("two that failed", lambda: bench.endings("dropped", "reference_down") == before + 2)
