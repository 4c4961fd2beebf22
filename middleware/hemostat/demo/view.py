"""What the demo shows, live in a terminal or as plain lines, and the report that it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hemostat.demo.traffic import Traffic

UNKNOWN = "–"


@dataclass(slots=True)
class Scene:
    """Everything there is to show. `status` is the admin port's /api/v1/status, {} before it has answered."""

    model: str
    data_url: str
    admin_url: str
    logs: str
    traffic: Traffic = field(default_factory=Traffic)
    status: Mapping[str, Any] = field(default_factory=dict)
    elapsed: float = 0.0
    note: str = ""


def report(scene: Scene) -> dict[str, Any]:
    """The figures as `--report` writes them; the calibrated ones equal the raw ones while identity serves."""
    status, traffic = scene.status, scene.traffic
    requests = {"sent": traffic.sent, "ok": traffic.ok, "failed": traffic.failed, **status["requests"]}
    return {
        "requests": requests,
        **{name: status[name] for name in ("tokens_scored", "top_k", "raw", "calibrated", "profile")},
    }


def number(value: float | None, digits: int = 3) -> str:
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def interval(figure: Mapping[str, Any] | None) -> str:
    """`0.412 [0.397, 0.428]`"""
    if not figure or figure.get("estimate") is None:
        return UNKNOWN
    low, high = figure["ci95"]
    return f"{number(figure['estimate'])} [{number(low)}, {number(high)}]"


def percent(value: float | None) -> str:
    return UNKNOWN if value is None else f"{100 * value:.1f} %"


def counts(by_reason: Mapping[str, int]) -> str:
    """`3 (queue_full 2, down 1)`"""
    total = sum(by_reason.values())
    if not total:
        return "0"
    return f"{total} ({', '.join(f'{reason} {n}' for reason, n in sorted(by_reason.items()) if n)})"


def line(scene: Scene) -> str:
    """One plain line: where no terminal is, or the live picture is not wanted."""
    requests = scene.status.get("requests", {})
    raw, calibrated = scene.status.get("raw", {}), scene.status.get("calibrated", {})
    profile = scene.status.get("profile", {})
    return (
        f"sent {scene.traffic.sent}, ok {scene.traffic.ok}, failed {scene.traffic.failed}; "
        f"shadowed {requests.get('shadowed', 0)}, scored {requests.get('scored', 0)} "
        f"({scene.status.get('tokens_scored', 0)} tokens); "
        f"KL {interval(raw.get('kl_nats'))} nats, calibrated {interval(calibrated.get('kl_nats'))}; "
        f"TV {number(raw.get('total_variation'))}; top-1 {percent(raw.get('top1_agreement'))}; "
        f"profile {profile.get('version', UNKNOWN)}"
    )


def picture(scene: Scene) -> RenderableType:
    """The live picture."""
    status, traffic = scene.status, scene.traffic
    requests = status.get("requests", {})
    reference, profile, queue = (status.get(name, {}) for name in ("reference", "profile", "queue"))

    flow = _grid()
    flow.add_row("requests", f"{traffic.sent} sent, {traffic.ok} ok, {traffic.failed} failed")
    flow.add_row(
        "shadowed", f"{requests.get('shadowed', 0)}, scored {requests.get('scored', 0)}, {_waiting(requests, queue)}"
    )
    flow.add_row("scored tokens", f"{status.get('tokens_scored', 0):,}")
    flow.add_row("skipped", counts(requests.get("skipped", {})))
    flow.add_row("dropped", counts(requests.get("dropped", {})))
    flow.add_row("reference", f"{reference.get('state', 'starting')}  {reference.get('detail', '')}".strip())
    flow.add_row("serving profile", _profile(profile))
    if calibration := status.get("calibration"):
        learned, candidates = calibration["learned_tokens"], len(calibration["candidates"])
        flow.add_row("calibrator", f"learned from {learned:,} tokens, {candidates} profiles under evaluation")
    if learner := status.get("learner"):
        flow.add_row("contextual", f"{learner['state']}  {learner['detail']}  {learner['tokens']:,} tokens")

    addresses = _grid()
    addresses.add_row("console", f"{scene.admin_url}/")
    addresses.add_row("metrics", f"{scene.admin_url}/metrics")
    addresses.add_row("data port", f"{scene.data_url}/v1   (model {scene.model!r}; point a client at it)")
    addresses.add_row("logs", scene.logs)

    last = Text(f"last answer: {' '.join(traffic.last_text.split())}", style="dim", overflow="ellipsis", no_wrap=True)
    parts: list[RenderableType] = [flow, Text(), _figures(status), Text(), addresses, Text(), last]
    if traffic.last_failure:
        parts.append(Text(f"last failure: {traffic.last_failure}", style="red"))
    if scene.note:
        parts.append(Text(scene.note, style="yellow"))
    return Panel(Group(*parts), title="Hemostat", subtitle=f"{scene.elapsed:.0f} s   Ctrl-C stops everything")


def _figures(status: Mapping[str, Any]) -> Table:
    raw, calibrated = status.get("raw", {}), status.get("calibrated", {})
    bound = (raw.get("kl_nats") or {}).get("bound", "")
    figures = Table(box=None, padding=(0, 2, 0, 0))
    figures.add_column("reference against compressed, per token")
    figures.add_column("raw [95 % interval]", justify="right")
    figures.add_column("calibrated", justify="right")
    figures.add_row(
        f"KL, nats, at least (from the top {status.get('top_k', UNKNOWN)})" if bound == "lower" else "KL, nats",
        Text(interval(raw.get("kl_nats")), style="bold"),
        Text(interval(calibrated.get("kl_nats")), style="bold"),
    )
    if bound != "exact":
        figures.add_row(
            "KL, nats, estimate with the tail",
            interval(raw.get("kl_nats_estimate")),
            interval(calibrated.get("kl_nats_estimate")),
        )
    for name, key, form in (
        ("total variation", "total_variation", number),
        ("same top-1", "top1_agreement", percent),
        ("probability covered by the top ids", "covered_mass", percent),
    ):
        figures.add_row(name, form(raw.get(key)), form(calibrated.get(key)))
    return figures


def _waiting(requests: Mapping[str, Any], queue: Mapping[str, Any]) -> str:
    waiting = requests.get("pending", queue.get("depth", 0))
    return f"{waiting} waiting ({queue.get('lag_seconds', 0.0):.1f} s behind)"


def _profile(profile: Mapping[str, Any]) -> str:
    if not profile:
        return UNKNOWN
    version, family, mode = profile["version"], profile["family"], profile["mode"]
    name = "identity: none has earned its place yet" if version == family == "identity" else f"{version} ({family})"
    return f"{name}; mode {mode}"


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="cyan", no_wrap=True, min_width=16)
    grid.add_column(overflow="fold")
    return grid
