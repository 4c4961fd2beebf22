"""The history that the console plots: points of bounded number, and the mean of the last tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hemostat.admin import history as overview
from hemostat.admin.history import MAX_POINTS, RECENT_POINTS, History


def status(n: int, kl: float | None = 0.5) -> Any:
    """What the history reads of a `Status`."""
    return SimpleNamespace(
        raw={"kl_nats": {"estimate": kl, "ci95": [None, None]}, "tokens": 10 * n},
        excess={},
        recovered=SimpleNamespace(ratio=None, ci95=[None, None]),
        proxy=SimpleNamespace(requests=n, failed=0),
        requests=SimpleNamespace(scored=n),
        shadow=SimpleNamespace(reference_tokens=n),
        queue=SimpleNamespace(depth=0),
    )


def test_history_forgets_and_is_of_numbers() -> None:
    history = History()
    assert history.due(0.0)
    assert history.report() == {name: [] for name in ("time", *History.NAMES)}
    for n in range(MAX_POINTS + 100):
        history.add(10.0 * n, 1000.0 + n, status(n))
    assert not history.due(10.0 * n + 9.9)
    assert history.due(10.0 * n + 10.0)
    report = history.report()
    assert {len(column) for column in report.values()} == {MAX_POINTS}
    assert report["time"][0] == 1100.0
    assert report["kl_low"] == report["floor"] == report["recovered"] == [None] * MAX_POINTS
    assert report["requests"][-1] == n
    assert history.report(1000.0 + n)["time"] == []
    assert overview.POINT_SECONDS * MAX_POINTS == 6 * 3600


def test_the_recent_mean_is_that_of_the_last_tokens() -> None:
    """Ten tokens a point: at first 0.1 nats each, then 0.9."""
    history = History()
    nats_of = [0.1] * 20 + [0.9] * RECENT_POINTS
    for n in range(1, len(nats_of) + 1):
        history.add(float(n), float(n), status(n, sum(nats_of[:n]) / n))
    recent = history.report()["kl_recent"]
    assert recent[:20] == pytest.approx([0.1] * 20)
    assert recent[-1] == pytest.approx(0.9)
    assert recent[22] == pytest.approx((3 * 0.9 + 3 * 0.1) / 6)
    history.add(99.0, 99.0, status(len(nats_of), 0.2))
    for _ in range(RECENT_POINTS):
        history.add(100.0, 100.0, status(len(nats_of), 0.2))
    assert history.report()["kl_recent"][-1] is None, "no token in the last minute"
