"""States of a deployment that the console has to explain, as the answers of the API.

Made from those of a real `Control`, so that their form is what the code writes."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from playwright.sync_api import Page
from tests.support.admin_server import KINDS

from hemostat.admin.alerts import ALERTS
from hemostat.admin.history import MAX_POINTS, POINT_SECONDS, History
from hemostat.admin.problem_sources import NO_PLUGINS
from hemostat.admin.problems import Found, problem
from hemostat.admin.status_parts import UpstreamStatus
from hemostat.config.schema import Gate, Settings
from hemostat.config.waiting_times import waiting_times
from hemostat.engines.passive import PLUGIN_ALONE
from hemostat.gate.live.measuring import questions
from hemostat.gate.live.report import as_json, of_verdict
from hemostat.gate.live.stored import FAIL, StoredGate, Subject
from hemostat_calibration.gate.live import LiveGate, LiveRules, LiveState

Json = dict[str, Any]
WAITING = waiting_times(
    Settings.model_validate(
        {
            "upstream": {"url": "http://10.0.0.1:8000"},
            "reference": {"backend": "vllm", "url": "http://ref:8000"},
            "calibration": {"mode": "auto"},
        }
    )
)
STEPS = tuple(time_.step for time_ in WAITING)
SERVING = "d846ad1765b5edc29ecef21f9a307eed"
HOUR = 3600.0


@dataclass
class State:
    """What the API answers, and the sentence that has to be readable without scrolling."""

    status: Json
    profiles: Json
    history: Json
    says: str = ""
    shows: list[str] = field(default_factory=list)
    """More that has to be on the first screen."""

    @property
    def at(self) -> float:
        return float(self.status["at"])

    def answer(self, page: Page) -> None:
        """Serve this state to the page instead of the server's own: at first one of ten seconds ago, so that there are
        rates."""
        before = copy.deepcopy(self.status)
        before["at"] -= 10.0
        before["proxy"]["requests"] -= min(120, before["proxy"]["requests"])
        before["shadow"]["reference_tokens"] -= min(9000, before["shadow"]["reference_tokens"])
        told = [json.dumps({"status": status, "profiles": self.profiles}) for status in (before, self.status)]
        page.add_init_script(
            "window.EventSource = class extends EventTarget { constructor() { super(); setTimeout(() => "
            f"{json.dumps(told)}.forEach((data) => this.dispatchEvent(new MessageEvent('state', {{ data }})))); }} }};"
        )
        page.route("**/api/v1/history*", lambda route: route.fulfill(json=self.history))

    def problem(self, alert: str, text: str, seconds: float, page: tuple[str, ...] = ()) -> None:
        """Add a problem that was found so long ago; the worst one comes first."""
        made = problem(Found(alert, text, page=page), self.at - seconds)
        problems = [*self.status["state"]["problems"], msgspec.to_builtins(made)]
        problems.sort(key=lambda problem: list(ALERTS).index(problem["alert"]))
        self.status["state"] = {"level": problems[0]["severity"], "problems": problems}

    def kind(self, name: str) -> Json:
        return next(kind for kind in self.status["calibration"]["kinds"] if kind["kind"] == name)


def engine(name: str, **more: Any) -> Json:
    told: Json = {
        "relays": 2,
        "up": 2,
        "drained": False,
        "excluded": False,
        "outstanding": 3,
        "requests": 20_480,
        "resent": 0,
        "ejections": 0,
        "figures": {"engine": name, "tokens": 90_000, "kl_nats": 0.081, "requests": 800, "outlier": False,
                    "farther": None, "evidence": 0.04, "since": None, "on_tokens": None},
        "holds": [SERVING],
    }  # fmt: skip
    made: Json = msgspec.to_builtins(msgspec.convert({"engine": name, **told, **more}, UpstreamStatus))
    return made


def canaries(state: State, engines: Sequence[str]) -> Json:
    """Make the canaries' part of the status: taken yesterday, and equal at all engines."""
    comparison = {"votes": 0, "needed": 26, "sequences": 50, "distance_nats": 0.002}
    row = {"at": state.at - 900, "since": None, "changed": False, "outlier": False, "baseline": comparison,
           "engines": comparison, "reference_nats": [0.291, 0.293], "model": "qwen3-8b-w4a16",
           "cause": None}  # fmt: skip
    taken = {"model": "qwen3-8b-w4a16", "root": "/models/qwen3-8b-w4a16", "vllm": "0.32.0", "weights": "",
             "tokens": 4740, "engine": engines[0], "taken": state.at - 90_000, "sequences": 50}  # fmt: skip
    rows = [row | {"engine": name} for name in engines]
    made: Json = {"detail": "", "set": taken, "failures": {}, "engines": rows}
    state.status["canaries"] = made
    return made


def history(at: float, kl: float = 0.08, points: int = MAX_POINTS, jump: float = 1.0, jump_points: int = 0) -> Json:
    """Hours of quiet traffic; the divergence is multiplied by `jump` in the last `jump_points`."""
    draw = np.random.default_rng(7)
    waves = 1.0 + 0.25 * np.sin(np.arange(points) / 250.0)
    recent = kl * (1.0 + 0.08 * draw.standard_normal(points))
    if jump_points:
        recent[-jump_points:] *= jump
    mean = np.cumsum(recent) / np.arange(1, points + 1)
    known = {
        "time": at - POINT_SECONDS * np.arange(points - 1, -1, -1.0),
        "kl_nats": mean,
        "kl_low": mean * 0.93,
        "kl_high": mean * 1.07,
        "kl_recent": recent,
        "floor": np.full(points, 0.004),
        "recovered": np.full(points, 0.21) + 0.004 * draw.standard_normal(points),
        "recovered_low": np.full(points, 0.16),
        "recovered_high": np.full(points, 0.26),
        "requests": np.cumsum(POINT_SECONDS * 12.0 * waves),
        "failed": np.zeros(points),
        "overhead_p99": np.full(points, 0.0008) + 0.0001 * draw.random(points),
        "scored": np.cumsum(0.6 * POINT_SECONDS * waves).round(),
        "reference_tokens": np.cumsum(900.0 * POINT_SECONDS * waves),
        "queue": draw.integers(0, 4, points).astype(float),
    }
    assert known.keys() == {"time", *History.NAMES}
    return {"points": {name: column.tolist() for name, column in known.items()}, "events": []}


def figure(part: Json, kl: float, requests: int) -> None:
    """Scale the figures of a group."""
    part["requests"] = requests
    part["kl_nats"] |= {"estimate": kl, "ci95": [kl * 0.93, kl * 1.07]}
    part["kl_nats_estimate"] |= {"estimate": kl * 1.06, "ci95": [kl * 0.9, kl * 1.2]}
    part["total_variation"], part["top1_agreement"] = 1.6 * kl, 1.0 - 1.1 * kl
    part["total_variation_upper"] |= {"estimate": 1.9 * kl, "ci95": [1.8 * kl, 2.0 * kl]}
    part["draft_acceptance"] |= {
        "lower": 1.0 - 1.9 * kl,
        "upper": 1.0 - 1.6 * kl,
        "ci95": [1.0 - 2.0 * kl, 1.0 - 1.5 * kl],
    }


def healthy(status: Json, profiles: Json) -> State:
    """A day of traffic, one profile that serves the most frequent kind; nothing is wrong."""
    status, profiles, at = copy.deepcopy(status), copy.deepcopy(profiles), time.time()
    old = profiles["serving"]
    status, profiles = (json.loads(json.dumps(body).replace(old, SERVING)) for body in (status, profiles))
    state = State(status, profiles, history(at), "No problem found", ["canaries: unchanged"])
    status |= {"at": at, "state": {"level": "ok", "problems": []}, "tokens_scored": 1_240_000, "relays": 2}
    status["compressed"]["models"] = ["qwen3-8b-w4a16"]
    status["reference"] = {"state": "ready", "detail": "Qwen/Qwen3-8B (bfloat16)"}
    progress(state, *STEPS)
    status["models"] = [status["models"][0] | {"names": ["qwen3-8b-w4a16"], "root": "/models/qwen3-8b-w4a16"}]
    status["upstream"] = [engine("10.0.0.1:8000"), engine("10.0.0.2:8000")]
    canaries(state, [row["engine"] for row in status["upstream"]])
    status["outlier_engine"] = {"state": "on", "detail": None}
    scored = int(state.history["points"]["scored"][-1])
    status["requests"] |= {"shadowed": scored + 89, "scored": scored, "pending": 2, "dropped": {"queue_full": 87}}
    status["proxy"] |= {"requests": 259_200, "generations": 258_100, "failed": 31, "failed_ratio": 31 / 259_200}
    status["proxy"]["recent"] = {"seconds": 60.0, "requests": 720, "failed": 0}
    status["proxy"]["by_outcome"] = {"ok": 259_000, "client_gone": 169, "upstream_failed": 31}
    status["shadow"] |= {"rate": 0.05, "reference_tokens": 19_440_000, "uptime_seconds": 6 * HOUR}
    status["coverage"] |= {"scored_share": {"tokens": 0.97, "requests": 0.98}, "not_scored": []}
    status["queue"] = {"depth": 1, "lag_seconds": 0.4}
    status["configuration"] |= {"loaded_at": at - 6 * HOUR}
    figure(status["raw"], 0.082, scored)
    for n, kind in enumerate(status["kinds"]):
        figure(kind["raw"], 0.06 + 0.02 * n, 9000 // (n + 1))
    status["excess"]["kl_nats"] |= {"estimate": 0.078, "ci95": [0.072, 0.084], "floor": 0.004}
    status["recovered"] |= {"ratio": 0.21, "ci95": [0.16, 0.26]}
    less = {"estimate": -0.017, "ci95": [-0.023, -0.011]}
    status["arms"]["treated_minus_control"]["kl_nats_estimate"] = less
    alarm = status["alarm"]
    alarm |= {"raised": False, "budget_nats": 0.15, "waits_for": [], "events": []}
    alarm["tests"] = [
        test
        | {
            "test": name,
            "kind": kind,
            "begun": True,
            "raised": False,
            "since": None,
            "on_requests": 0,
            "evidence": 0.11,
        }
        for test in alarm["tests"][:1]
        for name in ("change", "budget")
        for kind in KINDS
    ]
    alarm["kinds"] = [kind | {"watched": True, "spread_ratio": 1.02} for kind in alarm["kinds"]]
    status["outcomes"]["kinds"] = [row for row in status["outcomes"]["kinds"] if row["harmed"] is None]
    for kind in status["calibration"]["kinds"]:
        kind["held"] = None
    state.kind(KINDS[1])["summary"] = "identity; no profile is under test here"
    profiles["held"], profiles["events"] = [], [event for event in profiles["events"] if not event["kind"]]
    profiles["events"].insert(0, decided(at - 5 * HOUR, "promote", "proven on 1,204 held-out conversations"))
    state.history["events"] = []
    return state


def progress(state: State, *known: str) -> None:
    """Set which of the steps that take time are there, with the default settings and in mode auto."""
    state.status["progress"] = [
        {"step": time_.step, "what": time_.what, "when": time_.when, "known": time_.step in known} for time_ in WAITING
    ]


def unmeasured(state: State, seconds: float) -> None:
    """Nothing was scored for so long."""
    points, history_ = int(seconds / POINT_SECONDS), state.history["points"]
    history_["kl_recent"][-points:] = [None] * points
    history_["scored"][-points:] = [history_["scored"][-points - 1]] * points
    state.status["requests"]["scored"] = int(history_["scored"][-1])


def decided(at: float, decision: str, why: str, kind: str = KINDS[0]) -> Json:
    reason = "evidence" if decision == "promote" else "outcomes"
    return {"at": at, "decision": decision, "reason": reason, "version": SERVING, "kind": kind, "why": why,
            "evidence": {}}  # fmt: skip


def no_data(state: State) -> None:
    """Just started: vLLM answers, the reference does not yet."""
    status = state.status
    state.problem("HemostatReferenceDown", "The reference is not ready yet: nothing is measured (loading weights)", 40)
    status["reference"] = {"state": "starting", "detail": "loading weights"}
    status["requests"] |= {"shadowed": 0, "scored": 0, "skipped": {}, "dropped": {}, "pending": 0}
    status["proxy"] |= {"requests": 0, "generations": 0, "failed": 0, "failed_ratio": None}
    status["proxy"]["recent"] |= {"requests": 0, "failed": 0}
    progress(state)
    status["alarm"] |= {"tests": [], "kinds": [], "waits_for": []}
    status["calibration"]["kinds"], status["kinds"], state.profiles["by_kind"] = [], [], {}
    status["coverage"]["scored_share"] = {"tokens": None, "requests": None}
    status["raw"]["kl_nats"] |= {"estimate": None, "ci95": [None, None]}
    status["raw"]["total_variation"] = None
    status["canaries"] = {"detail": "no set was taken yet", "set": None, "failures": {}, "engines": []}
    state.history = history(state.at, points=1)
    state.says = "The reference is not ready yet: nothing is measured (loading weights)"
    state.shows = ["✓ vLLM answers", "✗ The reference is ready", "✗ First request", "✗ First score",
                   "canaries: no set", "What comes when", "after about 50 scored requests"]  # fmt: skip


def plugin_alone(state: State) -> None:
    """Just started, without relays: no vLLM with the plugin reports yet."""
    no_data(state)
    state.status["state"]["problems"] = []
    state.problem("HemostatNoRelays", NO_PLUGINS, 40)
    state.says = NO_PLUGINS
    state.status["passive"] = {"servers": 0, "reads_headers": False, "needs_proxy": PLUGIN_ALONE}
    state.status["relays"] = 0
    state.shows = ["✗ The plugin reports", "restart vLLM with HEMOSTAT_ADMIN_URL", "need the proxy (hemostat serve)",
                   "Only hemostat_shadow: off in vllm_xargs opts a request out"]  # fmt: skip


def first_hour(state: State) -> None:
    """An hour of traffic: there are figures, and nothing that takes a day."""
    status = state.status
    state.history = history(state.at, points=360)
    scored = int(state.history["points"]["scored"][-1])
    figure(status["raw"], 0.082, scored)
    seen = status["raw"]["kl_nats"]["ci95"]
    status["raw"]["kl_nats"] |= {"ci95": [None, None], "ci95_seen": seen}
    status["requests"] |= {"shadowed": scored + 2, "scored": scored, "dropped": {}}
    status["proxy"] |= {"requests": 43_200, "generations": 43_000, "failed": 0, "failed_ratio": 0.0}
    status["recovered"] |= {"ratio": None, "ci95": [None, None]}
    status["arms"]["treated_minus_control"]["kl_nats_estimate"] = {"estimate": None, "ci95": [None, None]}
    status["alarm"]["tests"] = [test | {"begun": False, "evidence": 0.0} for test in status["alarm"]["tests"]]
    status["alarm"]["waits_for"] = [f"baseline of {KINDS[0]}: 23 hours"]
    for kind in status["calibration"]["kinds"]:
        kind["version"] = None
    state.profiles |= {"by_kind": {}, "events": []}
    for name in ("recovered", "recovered_low", "recovered_high"):
        state.history["points"][name] = [None] * 360
    progress(state, "figure", "interval", "canaries")
    background = "adapter 171c242c: 38 of about 56 conversations of chat text sampled, over two cycles of the traffic"
    status["background"] = background
    state.says = "No problem found"
    state.shows = [background, "What comes when", "after 150 scored requests of a kind over at least a day",
                   "over at least 2 days", "in the hours measured so far", "alarm: learning"]  # fmt: skip


def vllm_dead(state: State) -> None:
    text = "None of the 2 engines answers: 100 % of the requests of the last minute failed"
    state.problem("HemostatUpstreamDown", text, 130)
    state.status["upstream"] = [engine(row["engine"], up=0, ejections=1) for row in state.status["upstream"]]
    state.status["proxy"]["recent"] |= {"failed": 720}
    unmeasured(state, 130)
    failed = state.history["points"]["failed"]
    failed[-13:] = [120.0 * n for n in range(1, 14)]
    state.says, state.shows = text, ["Repair vLLM. Hemostat needs no action", "for 2 min", "vLLM: problem",
                                     "errors: 720 of 720 requests in the last minute", "Act now."]  # fmt: skip


def reference_dead(state: State) -> None:
    detail = "http://ref:8000 refuses connections"
    state.status["reference"] = {"state": "down", "detail": detail}
    text = f"The reference does not answer: nothing is measured ({detail})"
    state.problem("HemostatReferenceDown", text, 1800)
    unmeasured(state, 1800)
    state.says, state.shows = text, ["Start or repair the reference. Clients are not affected.", "for 30 min",
                                     "Are clients affected? No:", "Act tomorrow.", "Last score 30 min ago",
                                     "measurement: waits for the reference"]  # fmt: skip


def alarm(state: State) -> None:
    """The model of one kind changed 20 minutes ago; the configuration was reloaded just before."""
    text = f"ALARM: the compressed model no longer matches its baseline in {KINDS[0]}"
    state.problem("HemostatModelChanged", text, 1200)
    raised = {"raised": True, "since": state.at - 1200, "on_requests": 46, "on_tokens": 9120, "evidence": 1.31}
    told = state.status["alarm"]
    told["raised"] = True
    told["tests"][0] |= raised
    why = f"change alarm raised on {KINDS[0]}"
    event = {"at": state.at - 1100, "decision": "alarm", "version": "", "why": why, "evidence": told["tests"][0]}
    told["events"] = [event]
    state.history = history(state.at, jump=2.4, jump_points=120)
    figure(state.status["raw"], state.history["points"]["kl_nats"][-1], state.status["requests"]["scored"])
    for before, decision, what in (
        (1500, "reload", "the configuration was reloaded"),
        (1210, "checkpoint", "qwen3-8b-w4a16 is /models/qwen3-8b-w4a16-v2, its reference Qwen/Qwen3-8B"),
    ):
        state.history["events"].append({"at": state.at - before, "decision": decision, "why": what})
    state.says = text
    state.shows = ["KL of the last minute", "Find the kind that changed", why, "models changed"]


def promoted(state: State) -> None:
    """A profile was promoted a quarter of an hour ago."""
    promotion = decided(state.at - 900, "promote", "proven on 1,204 held-out conversations")
    state.profiles["events"] = [promotion, *state.profiles["events"][1:]]
    state.says = "No problem found"
    state.shows = [SERVING[:8], "% of the traffic", "Since ", "(15 min)", "promoted"]


def harmed(state: State) -> None:
    """A profile made answers of one kind end early, and was rolled back there."""
    why = "cut is bad in 9.1% with the profile and 1.2% without, of 310 treated and 302 control conversations"
    state.kind(KINDS[1])["held"] = why
    state.kind(KINDS[1])["summary"] = f"held at identity until an operator releases it: {why}"
    state.profiles["held"] = [KINDS[1]]
    state.profiles["events"].insert(0, decided(state.at - 600, "roll_back", why, KINDS[1]))
    text = (
        f"A profile made answers in {KINDS[1]} worse (cut 0.091 with it, 0.012 without), and was taken from this kind"
    )
    state.problem("HemostatOutcomeHarm", text, 600, ("kinds", KINDS[1]))
    state.says = text
    state.shows = [
        "Find out why the profile harmed, then release the kind.",
        f"Open {KINDS[1]}",
        "rolled back",
        "1 kind held without a profile",
        "profiles: problem",
        "for 10 min",
    ]


def many_kinds(state: State) -> None:
    """25 kinds, all watched."""
    status = state.status
    named = [f"chat text sampled {n}" for n in range(25)]
    kinds, figures, baseline = status["calibration"]["kinds"][1], status["kinds"][1], status["alarm"]["kinds"][0]
    status["calibration"]["kinds"] = [state.kind(KINDS[0]) | {"kind": named[0]}] + [
        kinds | {"kind": name, "share": 0.3 / n} for n, name in enumerate(named[1:], 1)
    ]
    state.profiles["by_kind"] = {named[0]: SERVING}
    status["kinds"] = [copy.deepcopy(figures) | {"kind": name} for name in named]
    status["alarm"]["kinds"] = [baseline | {"kind": name} for name in named]
    test = status["alarm"]["tests"][0]
    status["alarm"]["tests"] = [test | {"kind": name} for name in named]
    state.says, state.shows = "No problem found", ["25 alarm tests active"]


def many_engines(state: State) -> None:
    """8 engines, one of them failing and one that has changed and is an outlier."""
    named = [f"10.0.0.{n}:8000" for n in range(1, 9)]
    outlier = engine("x")["figures"] | {"outlier": True, "farther": True, "evidence": 1.2, "kl_nats": 0.29,
                                    "since": state.at - 4000, "on_tokens": 4100}  # fmt: skip
    state.status["upstream"] = [
        engine(name, **{"up": 0, "ejections": 2} if n == 2 else {}, **{"figures": outlier} if n == 5 else {})
        for n, name in enumerate(named)
    ]
    told = canaries(state, named)
    told["failures"] = {named[2]: f"http://{named[2]}/v1/completions: Connection refused"}
    row = told["engines"][5]
    far = row["baseline"] | {"votes": 50, "distance_nats": 0.19}
    cause = "one engine of several: 10.0.0.6:8000 differs from then, 7 others do not; there weights or kernels: all"
    row |= {"changed": True, "since": state.at - 4000, "baseline": far, "cause": cause}
    state.says = f"Canaries: {named[5]} (qwen3-8b-w4a16) has changed: 50 of 50 sequences differ"
    state.problem("HemostatCanaryChanged", state.says, 4000)
    ejected = "1 of 8 engines gets no requests: 10.0.0.3:8000"
    state.problem("HemostatEngineEjected", ejected, 700)
    outlier_text = (
        f"Engines differ on the same kinds of traffic: {named[5]} is further from the reference than the others"
    )
    state.problem("HemostatEngineOutlier", outlier_text, 4000, ("engines", named[5]))
    state.shows = [ejected, "Repair the engine that gets no requests", outlier_text, f"Open {named[5]}",
                   "canaries: problem"]  # fmt: skip


def failed_gate(state: State) -> None:
    """A candidate that is bad in one kind of traffic, and has failed some requests."""
    rules = LiveRules(questions("other", 0.05, 0.15), 0.05, 0.0, 26)
    stored = StoredGate(Subject("http://10.0.0.99:8000", "other", state.at - 90_000), LiveState(rules))
    tests = LiveGate(stored.evidence)
    for unit in range(400):
        kind, excess = ("completions text sampled", 0.4) if unit % 4 == 3 else ("chat text sampled", -0.1)
        tests.update_met(kind)
        own = {"own_answers": excess, "bad_answers": 0.0} if unit % 5 == 0 else {}
        tests.update(kind, {"stable_tokens": excess + 0.01 * (unit % 3)} | own, state.at - 90_000 + 200 * unit)
    tests.update_met("chat json greedy")
    verdict = tests.verdict(lambda kind, units: 1.0)
    stored.state, stored.notes, stored.failures = (
        FAIL,
        {"the candidate failed: it answered 500: out of memory": 3},
        {"http_error": 3},
    )
    stored.why, stored.decided = of_verdict(verdict, stored), state.at - 600
    state.status["gate"] = msgspec.to_builtins(as_json(FAIL, stored.why, stored, verdict, Gate()))
    state.says = f"The live gate: fail: {stored.why}"
    state.problem("HemostatGateFailed", state.says, 600, ("gate",))


CHANGES: dict[str, Callable[[State], None]] = {
    "healthy": lambda _: None,
    "no data": no_data,
    "plugin alone": plugin_alone,
    "first hour": first_hour,
    "vLLM dead": vllm_dead,
    "reference dead": reference_dead,
    "alarm": alarm,
    "promoted": promoted,
    "harmed and rolled back": harmed,
    "25 kinds": many_kinds,
    "8 engines": many_engines,
}


def make(name: str, status: Json, profiles: Json) -> State:
    """status, profiles: of `admin_server.everything`."""
    state = healthy(status, profiles)
    CHANGES[name](state)
    return state
