"""The hemorrhage alarm: two tests on every route, with one false-alarm probability over all of them and the whole run.

`budget`  the divergence per token is more than the noise floor and what the operator allows; the unit is the request.
`change`  the stream no longer is what a frozen baseline of it says: another checkpoint, a driver, a KV-cache type;
          token by token, so that it can be fast.

Both are bets (Shafer 2021; Waudby-Smith & Ramdas 2024). A strategy multiplies its capital by a factor whose expected
value, given the past, is at most 1 while nothing is wrong; then whether the sum over all strategies ever reaches 1/α
has a probability of at most α (Ville's inequality), however often one looks. Since capital that was lost before
something went wrong would be missing afterwards, the strategies are funded anew with every request: of the whole, 1,
the k-th request gets 1/(k(k+1)), the rest is held back. That costs 2 log k of evidence, whenever it begins.

Change. The figure of a token is the *spread* of log c − log r over the ids that both models gave (`spread`): how much
the logits differ, whatever the softmax made of it, nearly as large for sure tokens as for unsure ones. For some ranges
A of it the baseline says how often it falls there, and a strategy stakes parts f_A of its capital: the factor is
1 − Σ f_A + Σ f_A 1{in A}/g_A. It is fair under the *conditional null*: given the past, a token's spread falls into A
with a probability of at most g_A. Two things stand against g_A being too small. It is not the baseline's share but an
upper confidence limit of it, with the design effect of tokens that are correlated within requests, for all ranges at
once. And where the tokens of a request resemble each other, the past says more than g_A does, and capital would grow
within requests: factors are therefore raised to a power p ≤ 1 (fair by Jensen's inequality), the largest for which a
strategy with `MARGIN` times that power would not have gained on the baseline, averaged over its requests, at any token.
That leaves room for requests that are odder than any of the baseline. Like every baseline, this one stands for what
follows only while the traffic is of one kind.

Budget. A request of n tokens, their mean x̄ after clipping at the cap, counts by its tokens up to N of them: with
w = min(n, N)/N the factor is 1 + w f (x̄/m − 1), fair while the mean per token is at most m, the allowed divergence plus
an upper confidence limit of the floor's.

The k-th test that was ever begun (all routes, both kinds, tests begun anew after an alarm) has α_k = α/(k(k+1)), which
sum to α. Half of that is for the bets, a quarter for the limits of baselines, a quarter for the limit of the floor.

An alarm *clears* after `clear_after` requests on which freshly funded bets lost money; then a new test begins. A change
that is meant to stay is made the new baseline by `rebase`.

How control uses it: `alarm = init(Settings(...))` once; for each scored record `alarm = update(alarm, route,
Observation(now, kl_rc, spread(record)), floor)`, with `floor` the upper end, in nats, of the noise floor's interval
(`confidence.ClippedMean.get(settings.alpha / 4).high` over the floor's records of the same figure; infinite while
unknown: the budget test waits); `readings(alarm)` for metrics and console; `save` and `load` around restarts. Routes
are the caller's, who bounds their number. Each costs at most about `baseline_tokens` float32 until its baseline is
complete, and some kilobytes afterwards.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import StrEnum
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Floats
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.records import TokenRecord

ABOVE = (0.5, 0.2, 0.05, 0.01, 0.002)
"""Ranges of the spread that are bet on: above the value that this share of the baseline is above."""
BELOW = (0.5, 0.2, 0.05, 0.01)
FRACTIONS = (0.9, 0.6, 0.3, 0.1, 0.03)
"""Parts of the capital that strategies stake."""
POWERS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12)
"""To which factors may be raised."""
MARGIN = 3.0
"""How much more power the baseline must bear. Found by simulation: 2 is too little where requests differ much."""
SEEN = 20
"""Requests of the baseline in which a range must occur to be bet on."""


class Kind(StrEnum):
    BUDGET = "budget"
    CHANGE = "change"


def spread(record: TokenRecord) -> Floats:
    """Standard deviation of log c − log r over the ids that both gave, [T] nats; NaN where they share fewer than 3.

    Constants cancel: it is one of the difference of the logits.
    """
    with np.errstate(invalid="ignore"):
        difference = record.compressed.logprobs - record.reference_at
    return spread_of(np.where(record.compressed.ids >= 0, difference, np.nan))


def spread_of(difference: Floats) -> Floats:
    """The same from log c − log r, [T, K], NaN or infinite where one of them is not known."""
    known = np.isfinite(difference)
    count = known.sum(axis=1)
    values = np.where(known, difference, 0.0)
    mean = values.sum(axis=1) / np.maximum(count, 1)
    square = np.where(known, (values - mean[:, None]) ** 2, 0.0).sum(axis=1)
    result: Floats = np.where(count >= 3, np.sqrt(square / np.maximum(count - 1, 1)), np.nan)
    return result


@dataclass(frozen=True, slots=True, eq=False)
class Bets:
    """Strategies on the spread, frozen.

    edges: float64 [B], increasing: bin b holds edges[b−1] < value ≤ edges[b].
    log_factors: float64 [S, B + 1], what a strategy's capital is multiplied by.
    """

    edges: Floats
    log_factors: Floats


def fit(baseline: Sequence[Floats], alpha: float) -> Bets:
    """The bets against a baseline of requests, each its tokens' spreads, without NaN.

    With a probability of at least 1 − alpha, no limit g is below the share that it stands for (by the normal
    approximation of Wilson's score, with the largest design effect of any range).
    Where hardly any value but one occurs (both models compute the same to the last bit), the only range is what lies
    above all of the baseline, and its limit that of a share of requests.
    InvalidArgumentError where the baseline has fewer than two requests.
    """
    if len(baseline) < 2:
        raise InvalidArgumentError(f"the baseline has {len(baseline)} requests: at least two are needed")
    values = np.concatenate(baseline)
    above, below = np.quantile(values, [1.0 - share for share in ABOVE]), np.quantile(values, BELOW)
    edges = np.unique(np.concatenate([above, below]))
    placed = [np.searchsorted(edges, request) for request in baseline]
    bins = np.arange(len(edges) + 1)
    # A bin is above edge e when its lower end is, below it when its upper end is.
    sides = [np.searchsorted(edges, above)[:, None] < bins, np.searchsorted(edges, below)[:, None] >= bins]
    hits = [np.array([side[:, at].sum(axis=1) for at in placed]) for side in sides]
    seen = [((n > 0).sum(axis=0) >= SEEN) & (n.sum(axis=0) < 0.9 * len(values)) for n in hits]
    sides, hits = [s[k] for s, k in zip(sides, seen, strict=True)], [h[:, k] for h, k in zip(hits, seen, strict=True)]
    if not any(map(len, sides)):
        z = NormalDist().inv_cdf(1.0 - alpha)
        beyond = np.array([0.0, 1.0 + len(baseline) / z**2])
        return Bets(values.max(keepdims=True), np.log([1.0 - f + f * beyond for f in FRACTIONS]))
    limits = _limits(np.concatenate(hits, axis=1), placed, alpha)
    paid = np.split(np.concatenate(sides) / limits[:, None], [len(sides[0])])
    stakes = np.concatenate([*paid, *(side.mean(axis=0, keepdims=True) for side in paid if len(side))])
    rows = np.log(np.concatenate([1.0 - f + f * stakes for f in FRACTIONS]))
    powers = _powers(rows, placed)
    kept = [p * row for p, row in zip(powers, rows, strict=True) if p]
    return Bets(edges, np.array(kept) if kept else np.zeros((1, len(edges) + 1)))


def _limits(hits: npt.NDArray[np.int64], placed: Sequence[npt.NDArray[np.int64]], alpha: float) -> Floats:
    """Upper limits of the shares of J ranges, all at once; hits [requests, J]."""
    lengths = np.array([len(at) for at in placed], np.float64)
    tokens = lengths.sum()
    share = hits.sum(axis=0) / tokens
    binomial = tokens * share * (1.0 - share)
    clustered = ((hits - share * lengths[:, None]) ** 2).sum(axis=0) * len(lengths) / (len(lengths) - 1)
    n = tokens / max(1.0, float((clustered / np.maximum(binomial, 1.0)).max()))
    z = NormalDist().inv_cdf(1.0 - alpha / len(share))
    limit: Floats = (share + z * z / (2 * n) + z * np.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)) / (
        1 + z * z / n
    )
    return np.minimum(limit, 1.0)


def _powers(rows: Floats, placed: Sequence[npt.NDArray[np.int64]]) -> list[float]:
    """Of each row of log factors [S, bins] the largest power that the baseline bears; 0 where it bears none."""
    at = np.full((len(placed), max(map(len, placed))), rows.shape[1])
    for row, bins in zip(at, placed, strict=True):
        row[: len(bins)] = bins
    found = []
    for row in np.column_stack([rows, np.zeros(len(rows))]):  # behind a request's end nothing happens
        capital = row[at].cumsum(axis=1)
        found.append(next((p for p in POWERS if _loses(MARGIN * p * capital)), 0.0))
    return found


def _loses(log_capital: Floats) -> bool:
    """Would a strategy, begun anew with each request [R, T], not have gained on average at any token?"""
    with np.errstate(over="ignore"):
        return bool(np.exp(log_capital).mean(axis=0).max() <= 1.0)


@dataclass(frozen=True, slots=True)
class Crossing:
    """What an alarm stands on.

    since: time of the request with which the evidence began. at: of the one that completed it.
    requests, tokens: evidence from then until it was complete. log_capital: ln of the capital, against ln(2/alpha).
    """

    since: float
    at: float
    requests: int
    tokens: int
    log_capital: float


@dataclass(frozen=True, slots=True, eq=False)
class _Purse:
    """The capital of S strategies. log_capital [S]; since, first_request, first_token [S]: when each one's greater part
    was funded."""

    log_capital: Floats
    since: Floats
    first_request: npt.NDArray[np.int64]
    first_token: npt.NDArray[np.int64]
    requests: int = 0
    tokens: int = 0


def _purse(strategies: int) -> _Purse:
    nothing = np.zeros(strategies, np.int64)
    return _Purse(np.full(strategies, -np.inf), np.full(strategies, np.nan), nothing, nothing)


def _bet(
    purse: _Purse, log_factors: Floats, tokens: int, now: float, log_target: float
) -> tuple[_Purse, Crossing | None]:
    """One request: log_factors [S, steps], of one step for the whole request or one for each of its tokens."""
    k = purse.requests + 1
    funded = -math.log(k * (k + 1.0) * len(purse.log_capital))
    anew = funded > purse.log_capital
    since = np.where(anew, now, purse.since)
    first_request = np.where(anew, purse.requests, purse.first_request)
    first_token = np.where(anew, purse.tokens, purse.first_token)
    path = np.logaddexp(purse.log_capital, funded)[:, None] + log_factors.cumsum(axis=1)
    whole = np.logaddexp(_log_sum(path), -math.log(k + 1.0))
    moved = _Purse(path[:, -1], since, first_request, first_token, k, purse.tokens + tokens)
    over = np.flatnonzero(whole >= log_target)
    if not len(over):
        return moved, None
    step = int(over[0])
    best = int(path[:, step].argmax())
    counted = step + 1 if log_factors.shape[1] == tokens else tokens
    return moved, Crossing(
        since=float(since[best]),
        at=now,
        requests=k - int(first_request[best]),
        tokens=purse.tokens - int(first_token[best]) + counted,
        log_capital=float(whole[step]),
    )


def _log_sum(values: Floats) -> Floats:
    top = values.max(axis=0)
    total: Floats = top + np.log(np.exp(values - top).sum(axis=0))
    return total


@dataclass(frozen=True, slots=True, eq=False)
class ChangeTest:
    """One change test at `alpha`, half of which is for the bets. `crossing`: once it has crossed."""

    bets: Bets
    alpha: float
    purse: _Purse
    crossing: Crossing | None = None

    @classmethod
    def begin(cls, bets: Bets, alpha: float) -> ChangeTest:
        return cls(bets, alpha, _purse(len(bets.log_factors)))

    def log_factors(self, spreads: Floats) -> Floats:
        """[S, tokens that have a spread]"""
        return self.bets.log_factors[:, np.searchsorted(self.bets.edges, spreads[~np.isnan(spreads)])]

    def update(self, spreads: Floats, now: float = 0.0) -> ChangeTest:
        """One request's tokens, [T]; NaN is left out. After a crossing nothing more happens."""
        factors = self.log_factors(spreads)
        if self.crossing is not None or not factors.shape[1]:
            return self
        purse, crossing = _bet(self.purse, factors, factors.shape[1], now, math.log(2.0 / self.alpha))
        return ChangeTest(self.bets, self.alpha, purse, crossing)


@dataclass(frozen=True, slots=True, eq=False)
class BudgetTest:
    """One budget test at `alpha`, half of which is for the bets. `crossing`: once it has crossed.

    budget, cap: nats per token, what is allowed above the floor and where values are clipped. most_tokens: N.
    """

    budget: float
    cap: float
    most_tokens: int
    alpha: float
    purse: _Purse = field(default_factory=lambda: _purse(len(FRACTIONS)))
    crossing: Crossing | None = None

    def log_factors(self, divergences: Floats, floor: float) -> Floats:
        """[S, 1]"""
        values = divergences[~np.isnan(divergences)]
        weight = min(len(values), self.most_tokens) / self.most_tokens
        ratio = float(np.clip(values, 0.0, self.cap).mean()) / (self.budget + max(floor, 0.0))
        factors: Floats = np.log1p(weight * np.array(FRACTIONS)[:, None] * (ratio - 1.0))
        return factors

    def update(self, divergences: Floats, floor: float, now: float = 0.0) -> BudgetTest:
        """One request's tokens, [T] nats; NaN is left out. floor: nats per token, at most that much is noise.

        Nothing happens while the floor is not finite, nor after a crossing.
        """
        tokens = int((~np.isnan(divergences)).sum())
        if self.crossing is not None or not tokens or not math.isfinite(floor):
            return self
        factors = self.log_factors(divergences, floor)
        purse, crossing = _bet(self.purse, factors, tokens, now, math.log(2.0 / self.alpha))
        return replace(self, purse=purse, crossing=crossing)


@dataclass(frozen=True, slots=True)
class Settings:
    """alpha: chance of any false alarm, over all routes, both tests and the whole run.

    budget: allowed divergence above the floor, nats per token; None: no budget tests. cap: where divergences are
    clipped, nats. most_tokens: a request counts by its tokens up to so many, in the budget test. baseline_tokens: how
    many the change test learns from, on each route, before it tests; 0: no change tests. clear_after: requests.
    """

    alpha: float = 0.01
    budget: float | None = None
    cap: float = 5.0
    most_tokens: int = 256
    baseline_tokens: int = 20_000
    clear_after: int = 30

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha < 1.0:
            raise InvalidArgumentError(f"alpha is {self.alpha}: it must be between 0 and 1")
        if self.budget is not None and not 0.0 < self.budget < self.cap:
            raise InvalidArgumentError(f"budget is {self.budget}: it must be between 0 and the cap of {self.cap}")
        if not math.isfinite(self.cap):
            raise InvalidArgumentError(f"cap is {self.cap}: it must be finite")
        if self.most_tokens < 1 or self.clear_after < 1:
            raise InvalidArgumentError("most_tokens and clear_after must be 1 or more")
        if self.baseline_tokens < 0:
            raise InvalidArgumentError(f"baseline_tokens is {self.baseline_tokens}: it must be 0 or more")


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """One scored request of a route. now: seconds, of any clock that does not go back.

    divergences: [T] nats, the figure of the budget. spreads: [T] nats. NaN where not available.
    """

    now: float
    divergences: Floats
    spreads: Floats


@dataclass(frozen=True, slots=True)
class Reading:
    """What one test on one route says now.

    raised: what it stands on; None when there is no alarm. learning: part of the baseline that is there, 1 once tests
    run. log_evidence: ln of the capital against "nothing is wrong"; alarms at ln(2/alpha). alpha, test: what this test
    spends, and its number among all that were begun. requests, tokens: that it has seen.
    """

    route: str
    kind: Kind
    raised: Crossing | None
    learning: float
    log_evidence: float
    alpha: float
    test: int
    requests: int
    tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class _Watch:
    """One test on one route; `calm`: after a crossing, ln of what each strategy made of 1 in this window of
    `calm_requests`."""

    test: BudgetTest | ChangeTest
    number: int
    calm: Floats | None = None
    calm_requests: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Route:
    budget: _Watch | None = None
    change: _Watch | None = None
    baseline: tuple[npt.NDArray[np.float32], ...] = ()
    """Spreads of the requests so far, until there are enough."""
    bets: Bets | None = None
    """From the complete baseline, for the first test or its successors."""


@dataclass(frozen=True, slots=True, eq=False)
class Alarm:
    """The alarm of all routes. tests: how many were ever begun."""

    settings: Settings
    tests: int = 0
    routes: Mapping[str, _Route] = field(default_factory=dict)


def init(settings: Settings, tests: int = 0) -> Alarm:
    """tests: how many an earlier part of the same run began; what they spent stays spent."""
    return Alarm(settings, tests)


def update(alarm: Alarm, route: str, observation: Observation, floor: float = 0.0) -> Alarm:
    """Add one scored request of a route. floor: see `BudgetTest.update`."""
    alarm, state = _ready(alarm, alarm.routes.get(route, _Route()))
    budget, change, now = state.budget, state.change, observation.now
    if budget is not None and isinstance(budget.test, BudgetTest):
        test = budget.test
        if test.crossing is None:
            budget = replace(budget, test=test.update(observation.divergences, floor, now))
        elif math.isfinite(floor) and not np.isnan(observation.divergences).all():
            budget = _calm(budget, test.log_factors(observation.divergences, floor), alarm.settings.clear_after)
    spreads = observation.spreads[~np.isnan(observation.spreads)]
    baseline = state.baseline
    if change is not None and isinstance(change.test, ChangeTest):
        changing = change.test
        if changing.crossing is None:
            change = replace(change, test=changing.update(spreads, now))
        elif len(spreads):
            change = _calm(change, changing.log_factors(spreads), alarm.settings.clear_after)
    elif alarm.settings.baseline_tokens and len(spreads):
        baseline = (*baseline, spreads.astype(np.float32))
    routes = {**alarm.routes, route: replace(state, budget=budget, change=change, baseline=baseline)}
    return replace(alarm, routes=routes)


def rebase(alarm: Alarm, route: str) -> Alarm:
    """What `route` is from now on is its new baseline: an alarm of change goes, and the next requests are learned."""
    state = alarm.routes.get(route, _Route())
    return replace(alarm, routes={**alarm.routes, route: _Route(budget=state.budget)})


def readings(alarm: Alarm) -> list[Reading]:
    """What every test says, in the order of routes."""
    return [
        _reading(alarm, route, state, kind, watch)
        for route, state in alarm.routes.items()
        for kind, watch, wanted in (
            (Kind.BUDGET, state.budget, alarm.settings.budget is not None),
            (Kind.CHANGE, state.change, alarm.settings.baseline_tokens > 0),
        )
        if wanted
    ]


def _reading(alarm: Alarm, route: str, state: _Route, kind: Kind, watch: _Watch | None) -> Reading:
    if watch is None:
        seen = sum(map(len, state.baseline))
        learning = min(seen / alarm.settings.baseline_tokens, 1.0) if kind is Kind.CHANGE else 0.0
        return Reading(route, kind, None, learning, 0.0, math.nan, 0, 0, 0)
    test, purse = watch.test, watch.test.purse
    held_back = -math.log(purse.requests + 1.0)
    evidence = float(np.logaddexp(_log_sum(purse.log_capital[:, None])[0], held_back)) if purse.requests else 0.0
    return Reading(
        route=route,
        kind=kind,
        raised=test.crossing,
        learning=1.0,
        log_evidence=evidence,
        alpha=test.alpha,
        test=watch.number,
        requests=purse.requests,
        tokens=purse.tokens,
    )


def _ready(alarm: Alarm, state: _Route) -> tuple[Alarm, _Route]:
    """The route with the tests that it can have now, also those that follow on a cleared alarm."""
    settings, tests = alarm.settings, alarm.tests

    def alpha(number: int) -> float:
        return settings.alpha / (number * (number + 1))

    if settings.budget is not None and (state.budget is None or _cleared(state.budget, settings)):
        tests += 1
        test = BudgetTest(settings.budget, settings.cap, settings.most_tokens, alpha(tests))
        state = replace(state, budget=_Watch(test, tests))
    learned = sum(map(len, state.baseline)) >= settings.baseline_tokens > 0 and len(state.baseline) >= SEEN
    if state.change is None and learned:
        tests += 1
        bets = fit([request.astype(np.float64) for request in state.baseline], alpha(tests) / 4.0)
        state = replace(state, change=_Watch(ChangeTest.begin(bets, alpha(tests)), tests), baseline=(), bets=bets)
    elif state.change is not None and _cleared(state.change, settings) and state.bets is not None:
        tests += 1
        state = replace(state, change=_Watch(ChangeTest.begin(state.bets, alpha(tests)), tests))
    return replace(alarm, tests=tests), state


def _calm(watch: _Watch, log_factors: Floats, window: int) -> _Watch:
    """One request after a crossing. A window that did not lose money is followed by the next."""
    begun = watch.calm is None or watch.calm_requests >= window
    before = np.zeros(len(log_factors)) if begun or watch.calm is None else watch.calm
    return replace(watch, calm=before + log_factors.sum(axis=1), calm_requests=1 if begun else watch.calm_requests + 1)


def _cleared(watch: _Watch, settings: Settings) -> bool:
    if watch.calm is None or watch.calm_requests < settings.clear_after:
        return False
    return float(_log_sum(watch.calm[:, None])[0]) <= math.log(len(watch.calm))


def save(alarm: Alarm) -> bytes:
    """All of it, as JSON; read by `load`."""
    return json.dumps(_plain(alarm)).encode()


def load(data: bytes, settings: Settings) -> Alarm:
    """What `save` wrote, going on with `settings`; tests already begun keep what they were begun with.

    InvalidArgumentError where it cannot be read.
    """
    try:
        alarm = _revived(json.loads(data))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidArgumentError(f"no saved alarm: {error}; begin anew") from None
    if not isinstance(alarm, Alarm):
        raise InvalidArgumentError("no saved alarm: something else was saved; begin anew")
    return replace(alarm, settings=settings)


_SAVED = {
    kind.__name__: kind for kind in (Alarm, Settings, _Route, _Watch, BudgetTest, ChangeTest, Bets, _Purse, Crossing)
}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        fields_of = {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
        return {"is": type(value).__name__, "fields": fields_of}
    if isinstance(value, np.ndarray):
        data = base64.b85encode(value.tobytes()).decode()
        return {"is": "array", "dtype": value.dtype.str, "shape": value.shape, "data": data}
    if isinstance(value, Mapping):
        return {"is": "mapping", "items": [[key, _plain(item)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _revived(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_revived(item) for item in value)
    if not isinstance(value, dict):
        return value
    if value["is"] == "array":
        data = np.frombuffer(base64.b85decode(value["data"]), np.dtype(value["dtype"]))
        return data.reshape(value["shape"])
    if value["is"] == "mapping":
        return {key: _revived(item) for key, item in value["items"]}
    return _SAVED[value["is"]](**{name: _revived(item) for name, item in value["fields"].items()})
