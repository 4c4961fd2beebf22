"""The history that the console plots: points of bounded number, and the mean of the last tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hemostat.admin import history as overview
from hemostat.admin.configuration import ConfigurationReport
from hemostat.admin.history import MAX_POINTS, RECENT_POINTS, History
from hemostat.admin.problems import DeploymentState, Found, problem
from hemostat.ipc.messages import OVERHEAD_BUCKETS


def status(n: int, kl: float | None = 0.5, **more: Any) -> Any:
    """What the history reads of a `Status`."""
    known: dict[str, Any] = {
        "at": 1000.0 + n,
        "raw": {"kl_nats": {"estimate": kl, "ci95": [None, None]}, "tokens": 10 * n},
        "excess": {},
        "recovered": SimpleNamespace(ratio=None, ci95=[None, None]),
        "proxy": SimpleNamespace(requests=n, failed=0, overhead_counts=[n, *[0] * len(OVERHEAD_BUCKETS)]),
        "requests": SimpleNamespace(scored=n),
        "shadow": SimpleNamespace(reference_tokens=n),
        "queue": SimpleNamespace(depth=0),
        "state": DeploymentState("ok", []),
        "models": [],
        "configuration": ConfigurationReport(0.0),
    }
    return SimpleNamespace(**known | more)


def test_history_forgets_and_is_of_numbers() -> None:
    history = History()
    assert history.due(0.0)
    assert history.report() == {"points": {name: [] for name in ("time", *History.NAMES)}, "events": []}
    for n in range(MAX_POINTS + 100):
        history.update(10.0 * n, 1000.0 + n, status(n))
    assert not history.due(10.0 * n + 9.9)
    assert history.due(10.0 * n + 10.0)
    report = history.report()["points"]
    assert {len(column) for column in report.values()} == {MAX_POINTS}
    assert report["time"][0] == 1100.0
    assert report["kl_low"] == report["floor"] == report["recovered"] == [None] * MAX_POINTS
    assert report["requests"][-1] == n
    assert history.report(1000.0 + n)["points"]["time"] == []
    assert overview.POINT_SECONDS * MAX_POINTS == 6 * 3600


def test_the_recent_mean_is_that_of_the_last_tokens() -> None:
    """Ten tokens a point: at first 0.1 nats each, then 0.9."""
    history = History()
    nats_of = [0.1] * 20 + [0.9] * RECENT_POINTS
    for n in range(1, len(nats_of) + 1):
        history.update(float(n), float(n), status(n, sum(nats_of[:n]) / n))
    recent = history.report()["points"]["kl_recent"]
    assert recent[:20] == pytest.approx([0.1] * 20)
    assert recent[-1] == pytest.approx(0.9)
    assert recent[22] == pytest.approx((3 * 0.9 + 3 * 0.1) / 6)
    history.update(99.0, 99.0, status(len(nats_of), 0.2))
    for _ in range(RECENT_POINTS):
        history.update(100.0, 100.0, status(len(nats_of), 0.2))
    assert history.report()["points"]["kl_recent"][-1] is None, "no token in the last minute"


def test_the_overhead_is_that_of_the_last_requests() -> None:
    """A hundred slow requests after the restart, then fast ones."""
    history, buckets = History(), len(OVERHEAD_BUCKETS) + 1
    slow = [0] * (buckets - 1) + [100]
    for n in range(2 * RECENT_POINTS):
        counts = [50 * n, *slow[1:]]
        history.update(
            float(n), 1.0 + n, status(n, proxy=SimpleNamespace(requests=n, failed=0, overhead_counts=counts))
        )
    result = history.report()["points"]["overhead_p99"]
    assert result[0] is None, "nothing is known of before"
    assert result[1:] == [OVERHEAD_BUCKETS[0]] * (2 * RECENT_POINTS - 1)
    counts = [50 * n, *[0] * (buckets - 2), 300]
    history.update(99.0, 99.0, status(n, proxy=SimpleNamespace(requests=n, failed=0, overhead_counts=counts)))
    assert history.report()["points"]["overhead_p99"][-1] == OVERHEAD_BUCKETS[-1], "JSON has no infinity"


def test_there_is_no_overhead_before_a_relay_has_reported() -> None:
    history = History()
    for n, counts in enumerate(([], [], [0, 5, *[0] * (len(OVERHEAD_BUCKETS) - 1)])):
        proxy = SimpleNamespace(requests=n, failed=0, overhead_counts=counts)
        history.update(float(n), 1.0 + n, status(n, proxy=proxy))
    assert history.report()["points"]["overhead_p99"] == [None, None, OVERHEAD_BUCKETS[1]]


def test_what_changed_is_an_event() -> None:
    """Problems that begin and end, another checkpoint, a reload; the state at the start is none."""

    def model(root: str, reference: str = "ref") -> Any:
        return SimpleNamespace(names=["m"], root=root, reference=reference)

    down = DeploymentState("critical", [problem(Found("HemostatUpstreamDown", "vLLM does not answer"), 0.0)])
    history = History()
    steps = [
        {"state": down, "models": [model("/one")]},
        {"state": down, "models": [model("/one")]},
        {"models": [model("/two")]},
        {"models": [model("/two")], "configuration": ConfigurationReport(7.0)},
        {"models": [model("/two", "other")], "state": down, "configuration": ConfigurationReport(7.0)},
    ]
    for n, more in enumerate(steps):
        history.update(float(n), float(n), status(n, **more))
    events = history.report()["events"]
    assert [(event["at"] - 1000.0, event["decision"], event["why"]) for event in events] == [
        (2.0, "solved", "vLLM does not answer"),
        (2.0, "checkpoint", "m is /two, its reference ref"),
        (3.0, "reload", "the configuration was reloaded"),
        (4.0, "problem", "vLLM does not answer"),
        (4.0, "checkpoint", "m is /two, its reference other"),
    ]
