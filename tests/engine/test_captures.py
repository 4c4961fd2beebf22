"""A profile is not loaded while vLLM captures a CUDA graph, nor does a capture begin during a load."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from tests.support.engine_profiles import VOCAB_SIZE, make_profile
from tests.support.waiting import HANG_SECONDS

torch = pytest.importorskip("torch")

from hemostat_calibration.errors import InvalidProfileError  # noqa: E402
from hemostat_engine import captures as modules  # noqa: E402
from hemostat_engine import library as libraries  # noqa: E402
from hemostat_engine.captures import Captures  # noqa: E402
from hemostat_engine.library import Library  # noqa: E402
from hemostat_engine.transform import HeldProfile  # noqa: E402

PROFILE = make_profile(1)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the library takes for torch's class of graphs."""

    class Graph:
        fails = False

        def capture_begin(self, *_: object, **__: object) -> None:
            if self.fails:
                raise RuntimeError("capture")

        def capture_end(self) -> None:
            if self.fails:
                raise RuntimeError("capture")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(libraries, "captures", Captures())
    return Graph


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, during: Callable[[], object] = lambda: None) -> Library:
    """A library of a GPU, whose loads call `during`."""

    def held(profile: object, _: object) -> HeldProfile:
        during()
        return HeldProfile(PROFILE)

    monkeypatch.setattr(libraries, "free_bytes", lambda device: None)
    monkeypatch.setattr(libraries, "HeldProfile", held)
    return Library(VOCAB_SIZE, torch.device("cuda"))


@pytest.mark.parametrize("fails", ["", "begin", "end"])
def test_a_load_waits_for_the_end_of_a_capture(graphs: Any, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    library = on_a_gpu(monkeypatch)
    graph = graphs()
    graph.fails = fails == "begin"
    monkeypatch.setattr(modules, "MAX_WAIT_SECONDS", 0.01)
    if fails == "begin":
        with pytest.raises(RuntimeError, match="capture"):
            graph.capture_begin()
    else:
        graph.capture_begin("pool", capture_error_mode="global")
        with pytest.raises(InvalidProfileError, match="not loaded yet: vLLM captures a CUDA graph"):
            library.put(PROFILE)
        assert library.versions() == ()
        graph.fails = fails == "end"
        if graph.fails:
            with pytest.raises(RuntimeError, match="capture"):
                graph.capture_end()
        else:
            graph.capture_end()
    assert library.put(PROFILE)


def test_a_capture_that_was_never_ended_is_over_with_the_next(graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    library = on_a_gpu(monkeypatch)
    monkeypatch.setattr(modules, "MAX_WAIT_SECONDS", 0.01)
    graphs().capture_begin()
    graph = graphs()
    graph.capture_begin()
    graph.capture_end()
    assert library.put(PROFILE)


def test_a_capture_waits_for_the_end_of_a_load(graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def begin() -> None:
        graphs().capture_begin()
        order.append("captures")

    capture = threading.Thread(target=begin)

    def load() -> None:
        capture.start()
        capture.join(0.05)
        order.append("loaded")

    library = on_a_gpu(monkeypatch, load)
    Library(VOCAB_SIZE, torch.device("cuda"))  # wraps the class once
    library.put(PROFILE)
    capture.join(HANG_SECONDS)
    assert order == ["loaded", "captures"]


def test_torch_has_what_is_wrapped() -> None:
    assert callable(torch.cuda.CUDAGraph.capture_begin)
    assert callable(torch.cuda.CUDAGraph.capture_end)
