"""The demo's live view, its plain lines, and the file of `--report`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hemostat_calibration.guard.decisions import Figure
from hemostat_calibration.messages import with_detail
from hemostat_lab.demo.traffic import Traffic

UNKNOWN = "–"
UNKNOWN_INTERVAL = "interval not known yet"
"""The text in place of an interval without ends, as on the console."""
DECISION_WORDS = {"drop": "end the tests of", "roll_back": "roll back"}
"""Of decisions whose names do not say to a reader what happens."""
REQUESTS_AFTER_PROMOTION = 60
"""The demo sends at least so many more requests after a promotion, unless `--requests` says when it ends. Then it ends
as soon as the difference of the arms has an interval."""
MOST_AFTER_PROMOTION = 240
"""The demo ends after so many more requests also if the difference has no interval yet."""
MAX_DECISIONS_SHOWN = 3
MAX_KINDS_SHOWN = 6
"""In the live view, the most frequent ones; the last lines have all."""


@dataclass(frozen=True, slots=True)
class FirstPromotion:
    """The cost of the first promotion. requests: sent until it was seen. seconds: from the first request to it."""

    requests: int
    seconds: float


@dataclass(slots=True)
class Scene:
    """The state that is shown. `status` is the response of /api/v1/status, {} before the first."""

    model: str
    data_url: str
    admin_url: str
    logs: str
    traffic: Traffic = field(default_factory=Traffic)
    status: Mapping[str, Any] = field(default_factory=dict)
    elapsed: float = 0.0
    note: str = ""
    decisions: Sequence[Mapping[str, Any]] = ()
    """Decisions about profiles, newest first: `events` of /api/v1/profiles."""
    first_promotion: FirstPromotion | None = None

    def update_decisions(self, decisions: Sequence[Mapping[str, Any]]) -> None:
        """Takes the decisions, newest first, and notes the first promotion."""
        self.decisions = decisions
        promotions = [event["at"] for event in decisions if event["decision"] == "promote"]
        if self.first_promotion is None and promotions:
            self.first_promotion = FirstPromotion(self.traffic.sent, min(promotions) - self.traffic.began_at)

    @property
    def finished(self) -> bool:
        """It is True if enough requests were sent since the promotion to compare the arms."""
        if self.first_promotion is None:
            return False
        since = self.traffic.sent - self.first_promotion.requests
        low, high = (_difference(self.status) or {}).get("ci95", (None, None))
        least = REQUESTS_AFTER_PROMOTION if None not in (low, high) else MOST_AFTER_PROMOTION
        return since >= least


def report(scene: Scene) -> dict[str, Any]:
    """The content of `--report`. Calibrated figures equal the raw ones while identity serves."""
    status, traffic = scene.status, scene.traffic
    requests = {"sent": traffic.sent, "ok": traffic.ok, "failed": traffic.failed, **status["requests"]}
    return {
        "requests": requests,
        **{name: status[name] for name in ("tokens_scored", "top_k", "raw", "calibrated", "profile")},
        **{name: status[name] for name in ("recovered", "arms", "calibration", "learner", "adapter") if name in status},
        "first_promotion": asdict(scene.first_promotion) if scene.first_promotion else None,
        "decisions": list(scene.decisions),
    }


def number(value: float | None, digits: int = 3) -> str:
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def figure_of(figures: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Returns a figure with its interval. The status gives some figures as numbers, with their intervals apart."""
    given = figures.get(name)
    if isinstance(given, Mapping):
        return given
    ends = figures.get("ci95", {}).get(name, (None, None))
    return {"estimate": given, "ci95": ends, "no_interval": figures.get("no_interval", {}).get(name)}


def interval(figure: Mapping[str, Any] | None) -> str:
    """The estimate and its interval, such as `0.412 [0.397, 0.428]`."""
    if not figure or figure.get("estimate") is None:
        return UNKNOWN
    low, high = figure["ci95"]
    if high is not None and high >= figure.get("cap", math.inf):
        low = high = None  # all that the figure can be, as after very few requests
    return f"{number(figure['estimate'])} {_ends(low, high, number, figure.get('no_interval'))}"


def in_nats(figure: Mapping[str, Any] | None) -> str:
    """The estimate in nats and its interval, such as `0.412 nats [0.397, 0.428]`."""
    estimate, _, ends = interval(figure).partition(" ")
    return f"{estimate} nats {ends}" if ends.startswith("[") else f"{estimate} nats, {ends}" if ends else estimate


def _ends(low: float | None, high: float | None, show: Callable[[float], str], why: str | None = None) -> str:
    """Both ends of an interval, the one that is known, or that none is. why: the reason that the status gives."""
    if low is not None and high is not None:
        return f"[{show(low)}, {show(high)}]"
    return (
        f"at least {show(low)}"
        if low is not None
        else f"at most {show(high)}"
        if high is not None
        else why or UNKNOWN_INTERVAL
    )


def percent(value: float | None) -> str:
    return UNKNOWN if value is None else f"{100 * value:.1f} %"


def share(figure: Mapping[str, Any] | None) -> str:
    """The same of a share, such as `24.1 % [20.3, 27.9]`."""
    if not figure or figure.get("estimate") is None:
        return UNKNOWN
    low, high = figure["ci95"]
    ends = _ends(low, high, lambda end: f"{100 * end:.1f}", figure.get("no_interval"))
    return f"{percent(figure['estimate'])} {ends}"


def counts(by_reason: Mapping[str, int]) -> str:
    """`3 (queue_full 2, down 1)`"""
    total = sum(by_reason.values())
    if not total:
        return "0"
    return f"{total} ({', '.join(f'{reason} {n}' for reason, n in sorted(by_reason.items()) if n)})"


def status_line(scene: Scene) -> str:
    """One line, for an output that is not a terminal and for `--no-console`."""
    requests = scene.status.get("requests", {})
    raw, calibrated = scene.status.get("raw", {}), scene.status.get("calibrated", {})
    profile = scene.status.get("profile", {})
    return (
        f"sent {scene.traffic.sent}, ok {scene.traffic.ok}, failed {scene.traffic.failed}; "
        f"shadowed {requests.get('shadowed', 0)}, scored {requests.get('scored', 0)} choices "
        f"({scene.status.get('tokens_scored', 0)} tokens); "
        f"KL {in_nats(raw.get('kl_nats'))}, calibrated {in_nats(calibrated.get('kl_nats'))}; "
        f"total variation {number(raw.get('total_variation'))}; same top-1 {percent(raw.get('top1_agreement'))}; "
        f"{_served(profile)}{_recovered(scene.status)}"
    )


def decision_line(event: Mapping[str, Any]) -> str:
    """One line: `promote 3f2a0c91 for chat text greedy (evidence): better ...; gain 0.112 nats by request, ...`"""
    evidence = event.get("evidence") or {}
    kind = f" for {event['kind']}" if event.get("kind") else ""
    decision = DECISION_WORDS.get(event["decision"], event["decision"])
    result = f"{decision} {event['version'][:8]}{kind} ({event['reason']}): {event['why']}"
    # The evidence of a proposal is the learner's own estimate, not that of the test; it is not shown.
    return f"{result}; {_evidence(evidence)}" if "mean_gain_by_token" in evidence else result


def kind_lines(scene: Scene) -> list[str]:
    """A line for each kind of traffic that was met: what serves it, or what evidence is missing."""
    return [
        f"{kind['kind']} ({percent(kind['share'])} of the traffic): {kind['summary']}"
        for kind in _met_kinds(scene.status)
    ]


def adapter_line(status: Mapping[str, Any]) -> str:
    """What was made for the engine to add to the model's weights, and whether it may be asked for; "" without it."""
    adapter = status.get("adapter") or {}
    if not adapter or adapter["state"] == "off":
        return ""
    state = f"adapter {with_detail(adapter['state'], adapter['detail'])}"
    parts = [f"{state}, {adapter['tokens']:,} tokens known"]
    if built := adapter["last_build"]:
        parts.append(_built(built))
    engine, judge = adapter["engine"], adapter["judge"]
    detail = f" ({engine['detail']})" if engine["detail"] else ""
    parts.append(f"at the engine: {engine['state']}{detail}, {len(engine['ready'])} can be used")
    parts.append(f"{judge['judged']} requests judged on copies of the model")
    return "; ".join(parts)


def _built(built: Mapping[str, Any]) -> str:
    """Of the last attempt to make one."""
    if not built.get("version"):
        return f"the last one failed ({built['outcome']})"
    held_out = built.get("held_out") or {}
    share_won = f", {percent(held_out['share'])} of KL won on its own held-out texts" if "share" in held_out else ""
    size = f"rank {built['rank']}, {built['bytes'] / 1e6:.1f} MB"
    return f"{built['version'][:8]} from {built['tokens']:,} tokens, {size}, {built['wall_seconds']:.0f} s{share_won}"


def arms_line(status: Mapping[str, Any]) -> str:
    """What clients received, by arm; "" before the first treated request."""
    arms = status.get("arms", {})
    figures = {name: figure_of(arms.get(name, {}), "kl_nats_estimate") for name in ("control", "treated")}
    kl = {name: figure["estimate"] for name, figure in figures.items()}
    if not kl["control"] or kl["treated"] is None:
        return ""
    control, treated = (f"{in_nats(figure)} ({arms[name]['requests']:,} requests)" for name, figure in figures.items())
    times = kl["treated"] / kl["control"]
    return (
        f"what clients received: KL {control} in the control arm, {treated} in the treated one: {times:.2f} times it; "
        f"treated minus control: {in_nats(_difference(status))}"
    )


def _difference(status: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns the difference of the arms in KL; None if it is not known."""
    figure: Mapping[str, Any] | None = (
        (status.get("arms") or {}).get("treated_minus_control", {}).get("kl_nats_estimate")
    )
    return figure


def promotion_line(scene: Scene) -> str:
    """The requests and the seconds that the first promotion took; "" before it."""
    if scene.first_promotion is None:
        return ""
    requests, seconds = scene.first_promotion.requests, scene.first_promotion.seconds
    return f"the first profile was promoted after {requests} requests, {seconds:.0f} s after the first one"


def _met_kinds(status: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [kind for kind in status.get("calibration", {}).get("kinds", []) if kind["requests"]]


def _evidence(evidence: Mapping[str, Any]) -> str:
    """What a test in one kind has shown."""
    mean, by_token = number(evidence.get("mean_gain")), number(evidence.get("mean_gain_by_token"))
    on = f"on {evidence['units']} held-out conversations"
    if evidence.get("figure") == Figure.TOTAL_VARIATION:
        kl = number(evidence.get("mean_kl_gain"))
        return f"gain of the total variation {mean} by request, {by_token} by token, of the KL {kl} nats, {on}"
    return f"gain {mean} nats by request, {by_token} by token, {on}"


def _recovered(status: Mapping[str, Any]) -> str:
    recovered = status.get("recovered") or {}
    if recovered.get("ratio") is None:
        return ""
    ratio = {**recovered, "estimate": recovered["ratio"]}
    return f"; recovered of KL: {share(ratio)}, {in_nats(recovered['gain_nats'])}"


def render(scene: Scene) -> RenderableType:
    """The live view."""
    status, traffic = scene.status, scene.traffic
    requests = status.get("requests", {})
    reference, profile, queue = (status.get(name, {}) for name in ("reference", "profile", "queue"))

    flow = _grid()
    flow.add_row("requests", f"{traffic.sent} sent, {traffic.ok} ok, {traffic.failed} failed")
    flow.add_row(
        "shadowed",
        f"{requests.get('shadowed', 0)} requests, scored {requests.get('scored', 0)} choices, "
        f"{_waiting(requests, queue)}",
    )
    flow.add_row("scored tokens", f"{status.get('tokens_scored', 0):,}")
    flow.add_row("skipped", counts(requests.get("skipped", {})))
    flow.add_row("dropped", counts(requests.get("dropped", {})))
    flow.add_row("reference", f"{reference.get('state', 'starting')}  {reference.get('detail', '')}".strip())
    flow.add_row("serving profile", _profile(profile))
    if background := status.get("background"):
        flow.add_row("background", background)
    if learner := status.get("learner"):
        flow.add_row("learner", f"{learner['state']}  {learner['detail']}  {learner['tokens']:,} tokens")
    if line := adapter_line(status):
        flow.add_row("adapter", line.removeprefix("adapter "))
    for kind in _met_kinds(status)[:MAX_KINDS_SHOWN]:
        flow.add_row(kind["kind"], f"{percent(kind['share'])} of the traffic; {kind['summary']}")
    for event in [e for e in scene.decisions if e["decision"] != "propose"][:MAX_DECISIONS_SHOWN]:
        flow.add_row("decided", decision_line(event))

    addresses = _grid()
    addresses.add_row("console", f"{scene.admin_url}/")
    addresses.add_row("metrics", f"{scene.admin_url}/metrics")
    addresses.add_row("data port", f"{scene.data_url}/v1   (model {scene.model!r}; point a client at it)")
    addresses.add_row("logs", scene.logs)

    last = Text(f"last answer: {' '.join(traffic.last_text.split())}", style="dim", overflow="ellipsis", no_wrap=True)
    parts: list[RenderableType] = [flow, Text(), _figures(status), Text()]
    if "treated" in status.get("arms", {}):
        parts += [_arms(status["arms"]), Text()]
    parts += [addresses, Text(), last]
    if traffic.last_failure:
        parts.append(Text(f"last failure: {traffic.last_failure}", style="red"))
    if scene.note:
        parts.append(Text(scene.note, style="yellow"))
    return Panel(Group(*parts), title="Hemostat", subtitle=f"{scene.elapsed:.0f} s   Ctrl-C stops everything")


def _figures(status: Mapping[str, Any]) -> Table:
    """Raw and calibrated figures; while a profile serves, both of the same requests, those since its promotion."""
    calibrated = status.get("calibrated", {})
    raw = calibrated.get("raw_same_requests") or status.get("raw", {})
    bound = (raw.get("kl_nats") or {}).get("bound", "")
    of = f"{calibrated['requests']:,} requests" if "raw_same_requests" in calibrated else "per token"
    figures = Table(box=None, padding=(0, 2, 0, 0))
    figures.add_column(f"reference against compressed, {of}")
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
    recovered = status.get("recovered") or {}
    if recovered.get("ratio") is not None:
        ratio = {**recovered, "estimate": recovered["ratio"]}
        figures.add_row("  recovered, exact, held-out", interval(recovered["gain_nats"]), share(ratio))
    figures.add_row("total variation", number(raw.get("total_variation")), number(calibrated.get("total_variation")))
    figures.add_row("same top-1", percent(raw.get("top1_agreement")), percent(calibrated.get("top1_agreement")))
    for decoding, top1 in calibrated.get("top1_by_decoding", {}).items():
        if top1["tokens"]:
            figures.add_row(f"  of {decoding} requests", share(top1["before"]), share(top1["after"]))
    figures.add_row(
        "probability covered by the top ids", percent(raw.get("covered_mass")), percent(calibrated.get("covered_mass"))
    )
    return figures


def _arms(arms: Mapping[str, Any]) -> Table:
    """Divergence of the text that clients received, by arm; requests are assigned at random."""
    control, treated = arms.get("control", {}), arms.get("treated", {})
    difference = arms.get("treated_minus_control", {})
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("what clients received, by arm [95 %]")
    for name, arm in (("control", control), ("treated", treated)):
        table.add_column(f"{name}, {arm.get('requests', 0):,} requests", justify="right")
    table.add_column("difference", justify="right")
    for name, key, show in (
        ("KL, nats, estimate with the tail", "kl_nats_estimate", interval),
        ("total variation", "total_variation", interval),
        ("same top-1", "top1_agreement", share),
    ):
        figures = (figure_of(control, key), figure_of(treated, key), difference.get(key))
        table.add_row(name, *map(show, figures))
    return table


def _waiting(requests: Mapping[str, Any], queue: Mapping[str, Any]) -> str:
    waiting = requests.get("pending", queue.get("depth", 0))
    return f"{waiting} waiting ({queue.get('lag_seconds', 0.0):.1f} s behind)"


def _served(profile: Mapping[str, Any]) -> str:
    version = profile.get("version", "identity")
    return "no profile serves" if version == "identity" else f"profile {version} serves"


def _profile(profile: Mapping[str, Any]) -> str:
    if not profile:
        return UNKNOWN
    version, family, mode = profile["version"], profile["family"], profile["mode"]
    name = (
        "identity: no profile is proven in any kind yet" if version == family == "identity" else f"{version} ({family})"
    )
    return f"{name}; mode {mode}"


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="cyan", no_wrap=True, min_width=16)
    grid.add_column(overflow="fold")
    return grid
