"""Decides from held-out evidence which profile may serve which kind of request: promote, hold or roll back.

Evidence is one number for each unit (`TokenRecord.unit`, once in each kind): the mean over its tokens of the gain of
the profile over what serves without it, known as an interval, in nats or of the total variation (`decisions.Figure`;
where an adapter is on either side). As evidence for the profile its lower end counts, as evidence against it the upper
end. Units must be of the held-out side of the split.

- A candidate's test number c is of one profile in some kinds. It is promoted in a kind when the closed test over these
  kinds rejects "its mean gain in this kind is at most 0" at alpha/(c(c+1)), and the gain by token is above 0, too.
- A serving profile is watched in each kind by itself. It is rolled back from the kind for *harm* as soon as the
  evidence that its gain is below 0, by unit and by token, reaches (k(k+1))/alpha, where its first window is the k-th of
  this kind: a sum that is funded anew all the time, so that an earlier gain does not hide a loss (`harm`). It is rolled
  back as *no longer supported* at the end of a window of so many units, unless by then the evidence of this window that
  its gain is above 0 has reached 1/alpha.
- Units may depend on each other: all evidence is raised to the power 1/v̂, with the variance inflation v̂ of their
  sums, which comes from what is known of the kind outside the tests (`Guard.update_dependence`), and for a candidate
  from its gains, too: the larger one. A candidate is not promoted before there are enough units to know it, over
  `MIN_CYCLES` of the traffic (`statistics.dependence`): of the kind, or of all kinds together. Then the larger v̂ of
  both counts, until the v̂ of the kind is known.
- The gains of a candidate may depend on each other where the figure that is noted does not. So they have to span a
  cycle, and of their own v̂ the few long batches that a cycle has count, too. Only held-out gains are asked: the gains
  of units that were learned from have another mean, and the gains of adapters would take exact distances of all units.
  Where the traffic has no cycle (`cycle` is 0), it is assumed that gains depend on each other only over times of which
  many fit in a test. `MIN_EFFECTIVE` effective gains are enough then.
- v̂ is 1 until what is noted, or the gains, refute that units are independent (`BatchMeans.inflation_of_bets`). There
  are two exceptions. For the gains of a test that has to span a cycle the upper limit of v̂ counts. For what serves the
  upper limit of the noted v̂ counts, too: a watch goes on for thousands of units, in which a v̂ that is a little too
  small takes back what does no harm.

The evidence is described, with its sources, in `wealth`; the closed test in `closing`. What is bounded, whatever the
gains' distribution and however often one looks, as long as no gain is below −width, exactly where no expected gain
depends on the units before, and where it does asymptotically, up to the error of v̂:

- Promotion: over the whole run, however many candidates and kinds, the chance of ever promoting a profile in a kind in
  which its mean gain is at most 0 is at most alpha. (Mean gain: of a unit of this kind, given all units before it,
  at most 0 at each of them.)
- Roll back for harm: for each kind, the chance of ever rolling back for harm a profile whose mean gain there is at
  least 0, by unit and by token (tokens of a unit above `KindTest.token_cap` not counted), is at most alpha. Kinds do
  not share this alpha: to miss a harm is worse than to lose a gain.
- Staying: a profile whose mean gain in a kind is at most 0 throughout a window outlasts it there with a chance of at
  most alpha, each window anew.
- One client: none of these errors becomes likelier by what any one client sends, from `wealth.MIN_CLIENTS` clients on.
  (Its share of a test's units is at most `client_share`, too, so that it does not use up a window.) For what serves the
  price is that "at most 0" and "at least 0" have to hold for what remains without any two clients; see `wealth`.

What is not: that the gain by token is above 0 at promotion is an estimate without an error rate (a long answer weighs
as much as hundreds of short ones, so that no bound of it would be short). Where gains are of the total variation, the
same is demanded of the gain in KL, by unit and by token, and is an estimate, too: it has no lower bound, and no test of
the mean of such a variable is valid and ever rejects (Bahadur & Savage, Annals of Mathematical Statistics 1956). A
profile that helps is rolled back as unsupported with a chance that depends on the window's length. To show a mean gain
of g takes about (width/g)(log(1/alpha) + 0.5) units, more where gains spread, where kinds differ, and where one client
has a large part of them; a window of `WINDOWS_PER_PROOF` times what the promotion took leaves room for chance. Units
that are copies of each other, sent by several clients, count as different ones where the unit's key does not show it.

A wide range has a cost that no method avoids: a loss of `width` once in n units cannot be excluded by fewer than n of
them, so every valid bound needs in the order of width/gain units. A smaller clamp makes proofs shorter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from hemostat_calibration.elapsed import TimeBreak
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.guard import saving
from hemostat_calibration.guard.closing import adjusted
from hemostat_calibration.guard.decisions import Action, Admission, Decision, Evidence, Figure, Reason, Role
from hemostat_calibration.guard.kind_test import KindTest
from hemostat_calibration.guard.wealth import MIN_CLIENTS
from hemostat_calibration.statistics.dependence import KindDependence

WINDOWS_PER_PROOF = 5
"""The length of a window, as a multiple of the number of units that the promotion took. With a client that sends
nothing but losses, up to its share, a profile that goes on as it was is still supported in time; see
tests/bench/guard/clients.py."""
MIN_WINDOW = 400
DEFAULT_WINDOW = 1000
"""The length of the window, in units, of a profile that the operator selected without statistical proof."""
MAX_WINDOW = 2000
SHOWN_ALPHA = 0.05
"""The probability that the interval of the mean gain in `Evidence` is wrong."""
MIN_CYCLES = 2
"""The number of cycles that have to be seen before anything is promoted. From one cycle no method can tell what a
profile gains from what all units of that cycle have in common, such as a template that is all traffic for a day.
"""
MAX_COUNTED_KINDS = 256
"""The largest number of kinds whose windows are counted each by itself; further ones share one count, so that no alpha
is spent twice."""

ALL_KINDS = ""
"""The name of the units of all kinds together, each relative to the mean of its kind."""
_UNKNOWN = "is not under test: begin one first"
_NO_FIGURES: Mapping[str, Figure] = MappingProxyType({})


class Guard:
    """Owns all tests and the alpha that they spent. Every test has a name, which the caller gives, and one or more
    kinds of traffic.

    alpha: the probability of each kind of error over the whole run. client_share: the largest share of a test's units
    that one client may contribute. cycle: the length of the traffic's cycle in seconds. v̂ of a kind, or of all kinds,
    is believed only if the noted units span `MIN_CYCLES` of it.

    >>> guard = Guard(alpha=0.05)
    >>> guard.begin_candidate("a profile", {"chat text": (1.0, 0.7), "rest": (1.0, 0.3)})
    1
    >>> for n in range(50):
    ...     unit, client = n.to_bytes(8, "big"), b"client %d" % (n % 8)
    ...     if guard.admit("a profile", "chat text", unit, client) is Admission.ADMITTED:
    ...         guard.update("a profile", "chat text", unit, client, lower=0.2, upper=0.2, tokens=20)
    >>> guard.decide("a profile", "chat text").action.value, guard.decide("a profile", "rest").action.value
    ('promote', 'wait')
    """

    def __init__(self, alpha: float = 0.05, client_share: float = 0.25, cycle: float = 0.0) -> None:
        if not 0.0 < alpha < 1.0:
            raise InvalidArgumentError(f"alpha is {alpha}: it must be between 0 and 1")
        if not 0.0 < client_share <= 1.0:
            raise InvalidArgumentError(f"client_share is {client_share}: it must be above 0 and at most 1")
        self._alpha = alpha
        self._client_share = client_share
        self._cycle = cycle
        self._state = saving.State()

    # --- how much units depend on each other -----------------------------------------------------------------------

    def update_dependence(self, kind: str, client: bytes, figure: float, now: float = 0.0) -> None:
        """Takes a unit of a kind, whether it is judged by or not: its client's digest, a figure of it that no profile
        has changed, and its time, seconds. How much these depend on each other (v̂ of `statistics.dependence`) is the
        least that is taken for the gains. Nothing is promoted in a kind before v̂ is known there, or for all kinds;
        without any note units count as independent unless their gains show otherwise. Raises InvalidArgumentError
        unless the figure is finite."""
        if not math.isfinite(figure):
            raise InvalidArgumentError(f"figure is {figure}: it must be finite")
        dependence = self._state.dependence
        mean = dependence[kind].mean if kind in dependence else figure
        dependence[ALL_KINDS] = dependence.get(ALL_KINDS, KindDependence()).update(client, figure - mean, now)
        if kind in dependence or len(dependence) <= MAX_COUNTED_KINDS:
            dependence[kind] = dependence.get(kind, KindDependence()).update(client, figure, now)

    def after_break(self, time_break: TimeBreak) -> None:
        """Notes that the time was set: what has not spanned the cycles that it has to span begins again, or goes on
        without the time that was lost (`TimeBreak`). Evidence of gains stays."""
        noted = self._state.dependence
        for kind, dependence in noted.items():
            noted[kind] = dependence.after_break(time_break, self._needed_seconds)
        for tests in self._state.tests.values():
            for test in tests.values():
                test.after_break(time_break, self._cycle)

    def forget(self, kind: str | None = None) -> None:
        """Forgets what was noted of this kind, or of all kinds: it came from other traffic, or from other models."""
        for name in [kind] if kind is not None else list(self._state.dependence):
            self._state.dependence.pop(name, None)

    def noted_inflation(self, kind: str, units: int) -> float:
        """Returns v̂ of sums of so many units of a kind, as far as what was noted says it: 1 or more. The tests of a
        gate take at least this. It is the upper limit, and not the v̂ of bets that candidates' tests take."""
        in_cycles = self._cycle > 0.0
        return max([1.0, *(d.inflation_of_sums(units) if in_cycles else d.inflation for d in self._noted(kind))])

    @property
    def has_seen_cycles(self) -> bool:
        """It is True if what was noted spans `MIN_CYCLES`, or if nothing was noted. Nothing is promoted before."""
        pooled = self._state.dependence.get(ALL_KINDS)
        return pooled is None or pooled.spans(self._needed_seconds)

    def is_known(self, kind: str) -> bool:
        """Returns True if v̂ is known for this kind, or if nothing was noted at all. If nothing was noted of the kind,
        v̂ of all kinds stands in.
        """
        own, pooled = self._state.dependence.get(kind), self._state.dependence.get(ALL_KINDS)
        if pooled is None or (own is not None and own.known_for(self._needed_seconds)):
            return True
        return pooled.known_for(self._needed_seconds) and (own is None or not own.too_dependent)

    # --- begin and end -----------------------------------------------------------------------------------------------

    def begin_candidate(
        self, name: str, kinds: Mapping[str, tuple[float, float]], figures: Mapping[str, Figure] = _NO_FIGURES
    ) -> int:
        """Begins a candidate's test, dropping an older one of that name. Returns its number. (Without kinds, which may
        be
        added later, it has none: the last number given is returned.)

        kinds: kind -> (width, weight). width: no gain is below −width, nats. For a profile against identity that is the
            width of its Δz (twice `transform.max_shift`); for one profile against another, the sum of theirs; of the
            total variation 1. weight: above 0, the share of the kind in the traffic so far; the larger, the less its
            proof takes.
        figures: by kind, what the gains are of; nats where a kind is absent. Raises InvalidArgumentError unless widths
        and weights are above 0.
        """
        number = self._state.candidate_tests + bool(kinds)
        tests = {}
        for kind, (width, weight) in kinds.items():
            if not (math.isfinite(weight) and weight > 0.0):
                raise InvalidArgumentError(f"weight is {weight}: it must be a number above 0")
            tests[kind] = KindTest(Role.CANDIDATE, width, number, weight, figure=figures.get(kind, Figure.NATS))
        self.end(name)
        self._state.candidate_tests = number
        self._state.tests[name] = tests
        return number

    def begin_kind(self, name: str, kind: str, width: float, figure: Figure = Figure.NATS) -> int:
        """Begins a kind that appeared later, or begins it anew since what serves there has changed. Returns its number:
        it is a test of its own. Raises InvalidArgumentError if there is no test of that name, or width is not above
        0."""
        if name not in self._state.tests:
            raise InvalidArgumentError(f"{name[:80]} {_UNKNOWN}")
        number = self._state.candidate_tests + 1
        test = KindTest(Role.CANDIDATE, width, number, figure=figure)
        self.end_kind(name, kind)
        self._state.candidate_tests = number
        self._state.tests.setdefault(name, {})[kind] = test
        return number

    def begin_watch(
        self,
        name: str,
        kind: str,
        width: float,
        window: int = DEFAULT_WINDOW,
        like: str | None = None,
        figure: Figure = Figure.NATS,
    ) -> None:
        """Watches what serves in a kind from now on, dropping an older watch of that name and kind.

        width, figure: as for a candidate, over identity. window: units, at most `MAX_WINDOW` are used.
        like: name of the candidate's test that was promoted here: the lengths of its answers fix the weights by token.
        Raises InvalidArgumentError unless width and window are above 0.
        """
        if window < 1:
            raise InvalidArgumentError(f"window is {window}: it must be 1 or more")
        number = self._window(kind)
        test = KindTest(Role.SERVING, width, number, window=min(window, MAX_WINDOW), figure=figure)
        proof = self._state.tests.get(like, {}).get(kind) if like is not None else None
        if proof is not None:
            test.token_cap = proof.typical_tokens
            test.inherited = proof.own_inflation()
        self._state.tests.setdefault(name, {})[kind] = test
        self._count_window(kind, number)

    def end(self, name: str) -> None:
        """Drops a test with all its kinds, if there is one of that name. The alpha that it spent is not spent again."""
        self._state.tests.pop(name, None)
        self._state.ended.pop(name, None)

    def end_kind(self, name: str, kind: str) -> None:
        """Drops one kind of a test, if it is there. In the closed test over the others it stays as it was."""
        tests = self._state.tests.get(name, {})
        test = tests.pop(kind, None)
        if test is not None and test.role is Role.CANDIDATE:
            ended = [*self._state.ended.get(name, ()), (test.number, test.weight, self._log_e(kind, test))]
            running = {other.number for other in tests.values()}
            self._state.ended[name] = [item for item in ended if item[0] in running]

    def freeze(self, name: str, kind: str) -> None:
        """Freezes the test of a candidate that was promoted in this kind: nothing more is counted there, the other
        kinds go on."""
        self._test(name, kind).frozen = True

    # --- evidence ----------------------------------------------------------------------------------------------------

    def admit(self, name: str, kind: str, unit: bytes, client: bytes) -> Admission:
        """Returns the decision whether a unit may count in a test. Call it before the unit's gain is looked at, and
        `update` only for admitted units.

        unit: its digest; a unit with b"" counts every time. client: its digest; b"" is one client, too.
        """
        test = self._state.tests.get(name, {}).get(kind)
        if test is None:
            return Admission.UNKNOWN
        return self._current(name, kind, test).admit(unit, client, self._client_share)

    def has_counted(self, name: str, kind: str, unit: bytes) -> bool:
        """Returns True if the unit can add nothing: there is no such test, it has ended, or it has counted or refused
        the unit. The call changes nothing.
        """
        test = self._state.tests.get(name, {}).get(kind)
        return test is None or test.frozen or test.has_counted(unit)

    def figure(self, name: str, kind: str) -> Figure | None:
        """Returns the figure in which a test's gains are given; None if there is no such test."""
        test = self._state.tests.get(name, {}).get(kind)
        return None if test is None else test.figure

    def number(self, name: str, kind: str) -> int:
        """Returns the number whose part of alpha the decisions of this test spend; 0 if there is no such test."""
        test = self._state.tests.get(name, {}).get(kind)
        return 0 if test is None else _number(test)

    def update(
        self,
        name: str,
        kind: str,
        unit: bytes,
        client: bytes,
        lower: float,
        upper: float,
        tokens: int,
        kl_gain: float | None = None,
        now: float = 0.0,
    ) -> None:
        """Counts one unit of `tokens` tokens, its mean gain between `lower` and `upper` (equal where exact).

        now: its time, seconds; the gains of a candidate have to span a cycle before it is promoted.
        kl_gain: given where, and only where, the test's figure is the total variation: the unit's mean gain in KL,
            nats; minus infinity where the profile gives no distribution at a token.
        For a serving profile whose window is over, and which was not rolled back, this is the first of the next window.
        Raises InvalidArgumentError for what is not under test, a unit that has counted, or a gain outside of ±width or
        of another figure.
        """
        test = self._current(name, kind, self._test(name, kind))
        if test.frozen:
            raise InvalidArgumentError(f"{name[:80]} is frozen in {kind[:80]}: ask `admit` first")
        test.update(unit, client, lower, upper, tokens, kl_gain, now, self._longest_gap)
        if test.role is Role.SERVING and not test.supported:
            test.supported = test.reaches(-math.log(self._alpha), lambda: self._inflation(kind, test))

    def update_gain_dependence(self, name: str, kind: str, lower: float, now: float) -> None:
        """Takes the gain (lower end) of a unit that a candidate's test is too full to count: how much gains depend on
        each other is estimated from it, too. now: see `update`. Raises InvalidArgumentError for what is not under
        test."""
        self._test(name, kind).update_dependence(lower, now, self._longest_gap)

    def spans_cycle(self, name: str, kind: str) -> bool:
        """Returns True if the gains of a candidate's test span a cycle: before that it is not promoted there. Raises
        InvalidArgumentError for what is not under test."""
        return self._test(name, kind).spans(self._cycle)

    def oppose(self, name: str, kind: str, lower: float, figure: Figure = Figure.NATS) -> None:
        """Notes the gain (lower end) of a unit that a candidate's test has refused for its client's share. It does
        not count, and can prevent a promotion: else a client with most of the traffic could be harmed unseen. Raises
        InvalidArgumentError for what is not under test as a candidate, or a gain below −width or of another figure.
        """
        self._test(name, kind).oppose(lower, figure)

    def decide(self, name: str, kind: str) -> Decision:
        """Returns the action that the evidence allows now. The call changes nothing: the caller acts on it
        (`begin_watch`, `freeze`, `end_kind`).

        Raises InvalidArgumentError if the profile is not under test in this kind.
        """
        test = self._test(name, kind)
        needed = self._needed(test)
        if test.role is Role.CANDIDATE:
            proven = (
                not test.frozen
                and self.is_known(kind)
                and test.reaches(needed, lambda: self._inflation(kind, test), seconds=self._cycle)
                and test.gains_by_token
                and test.gains_in_kl
                and self._adjusted(name, test) >= needed
            )
            return Decision(Action.PROMOTE if proven else Action.WAIT)
        if test.harm_reaches(needed, self._inflation(kind, test)):
            return Decision(Action.ROLL_BACK, Reason.HARM)
        if test.window_is_over and not test.supported:
            return Decision(Action.ROLL_BACK, Reason.UNSUPPORTED)
        return Decision(Action.HOLD)

    def evidence(self, name: str, kind: str) -> Evidence:
        """Returns the evidence that `decide` follows from. Raises InvalidArgumentError if the profile is not under test
        in this kind.
        """
        test = self._test(name, kind)
        candidate = test.role is Role.CANDIDATE
        interval = test.gain.get(SHOWN_ALPHA)
        log_e = self._log_e(kind, test) if candidate else test.log_harm(self._inflation(kind, test))
        return Evidence(
            kind=kind,
            role=test.role,
            units=test.units,
            tokens=test.tokens,
            mean_gain=interval.mean,
            low=interval.low,
            high=interval.high,
            mean_gain_by_token=test.mean_gain_by_token,
            log_e=log_e,
            log_e_adjusted=self._adjusted(name, test) if candidate else log_e,
            needed=self._needed(test),
            clients=test.clients,
            refused=test.refused,
            client_share_active=test.clients >= MIN_CLIENTS,
            test=test.number,
            alpha=self._alpha_of(test),
            window=test.window,
            supported=test.supported,
            frozen=test.frozen,
            figure=test.figure,
            mean_kl_gain=test.mean_kl_gain,
            mean_kl_gain_by_token=test.mean_kl_gain_by_token,
            inflation=self._inflation(kind, test),
        )

    def units(self, name: str, kind: str) -> tuple[int, int]:
        """Returns the number of units that counted in a test, and of those that were refused for their client's share.
        Raises InvalidArgumentError for what is not under test."""
        test = self._test(name, kind)
        return test.units, test.refused

    # --- what runs ---------------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._state.tests)

    def kinds(self, name: str) -> tuple[str, ...]:
        """Returns the kinds of a test, promoted ones included; none if there is no test of that name."""
        return tuple(self._state.tests.get(name, ()))

    def is_running(self, name: str, kind: str) -> bool:
        """Returns True if units of this kind may count in this test."""
        test = self._state.tests.get(name, {}).get(kind)
        return test is not None and not test.frozen

    @property
    def candidate_tests(self) -> int:
        """The number of candidates' tests begun over the whole run."""
        return self._state.candidate_tests

    @property
    def windows(self) -> Mapping[str, int]:
        """By kind, the number of windows begun over the whole run; "" counts all kinds beyond `MAX_COUNTED_KINDS`."""
        return dict(self._state.windows)

    def raise_counts(self, candidate_tests: int, windows: Mapping[str, int]) -> None:
        """Tests that another part of the same run began: their alpha is not spent again. Smaller numbers change
        nothing."""
        self._state.candidate_tests = max(self._state.candidate_tests, candidate_tests)
        for kind, number in windows.items():
            self._count_window(kind, max(number, self._window(kind) - 1))

    # --- storage -----------------------------------------------------------------------------------------------------

    def save(self) -> bytes:
        """Returns the whole state as JSON; its size: see `saving`."""
        return saving.encode(self._state)

    @classmethod
    def load(cls, data: bytes, alpha: float, client_share: float, cycle: float = 0.0) -> Guard:
        """Returns a guard that goes on from a state that was saved. Raises InvalidArgumentError if it is damaged, or of
        another format."""
        guard = cls(alpha, client_share, cycle)
        guard._state = saving.decode(data)
        return guard

    # --- parts -------------------------------------------------------------------------------------------------------

    def _test(self, name: str, kind: str) -> KindTest:
        test = self._state.tests.get(name, {}).get(kind)
        if test is None:
            raise InvalidArgumentError(f"{name[:80]} in {kind[:80]} {_UNKNOWN}")
        return test

    def _current(self, name: str, kind: str, test: KindTest) -> KindTest:
        """Returns the test, or the next window of it where this one is over."""
        if not test.window_is_over:
            return test
        number = self._window(kind)
        following = KindTest(
            Role.SERVING, test.width, number, window=test.window, token_cap=test.typical_tokens, figure=test.figure
        )
        following.inherited, following.harm = test.inherited, test.harm
        self._state.tests[name][kind] = following
        self._count_window(kind, number)
        return following

    def _alpha_of(self, test: KindTest) -> float:
        number = _number(test)
        return self._alpha / (number * (number + 1))

    def _needed(self, test: KindTest) -> float:
        """Returns the log of the e-value at which the test's action is taken."""
        return -math.log(self._alpha_of(test))

    def _adjusted(self, name: str, test: KindTest) -> float:
        tests = self._state.tests[name].items()
        family = [(kind, t) for kind, t in tests if t.number == test.number]
        family.sort(key=lambda item: item[1] is not test)
        ended = [item for item in self._state.ended.get(name, ()) if item[0] == test.number]
        log_e = [*(self._log_e(kind, t) for kind, t in family), *(value for _, _, value in ended)]
        weights = [*(t.weight for _, t in family), *(weight for _, weight, _ in ended)]
        return adjusted(log_e, weights, 0)

    @property
    def _needed_seconds(self) -> float:
        """The time in seconds that noted units have to span before anything is promoted."""
        return MIN_CYCLES * self._cycle

    @property
    def _longest_gap(self) -> float:
        """The time that is counted between two gains, at most."""
        return self._cycle / 2.0 if self._cycle else math.inf

    def _in_cycles(self, test: KindTest) -> bool:
        return self._cycle > 0.0 and test.role is Role.CANDIDATE

    def _inflation(self, kind: str, test: KindTest) -> float:
        """Returns v̂ of sums as long as the test, as far as it is known: the v̂ of what was noted, or of the
        test's own gains, the larger one. Where the traffic has no cycle, and for what serves, whose harm has to be
        found soon, units depend on each other over no longer times than many of them fit in."""
        in_cycles, noted = self._in_cycles(test), self._noted(kind)
        known = [d.inflation_of_bets(test.units if in_cycles else 0) for d in noted]
        if test.role is Role.SERVING:
            known += [d.inflation for d in noted]
        return max([*known, test.own_inflation(in_cycles)])

    def _noted(self, kind: str) -> list[KindDependence]:
        """Returns what was noted of a kind, and of all kinds until the kind's own is known."""
        own, pooled = self._state.dependence.get(kind), self._state.dependence.get(ALL_KINDS)
        if own is not None and (pooled is None or own.known_for(self._needed_seconds)):
            pooled = None
        return [dependence for dependence in (own, pooled) if dependence is not None]

    def _log_e(self, kind: str, test: KindTest) -> float:
        return test.log_e(self._inflation(kind, test))

    def _window(self, kind: str) -> int:
        """Returns the number of the next window of a kind."""
        windows = self._state.windows
        return windows.get(kind if kind in windows or len(windows) < MAX_COUNTED_KINDS else "", 0) + 1

    def _count_window(self, kind: str, number: int) -> None:
        windows = self._state.windows
        windows[kind if kind in windows or len(windows) < MAX_COUNTED_KINDS else ""] = number


def _number(test: KindTest) -> int:
    """Returns the test's number; for what serves, the number of its first window: evidence of harm goes on from window
    to window."""
    return test.number if test.harm is None else test.harm.number


def window_after_promotion(proof: Evidence) -> int:
    """Returns the length, in units, of the windows in which a profile is watched in a kind that was promoted there on
    this evidence.

    >>> guard = Guard()
    >>> _ = guard.begin_candidate("a profile", {"rest": (1.0, 1.0)})
    >>> guard.update("a profile", "rest", b"unit", b"client", 0.2, 0.2, tokens=20)
    >>> window_after_promotion(guard.evidence("a profile", "rest"))
    400
    """
    return min(max(MIN_WINDOW, WINDOWS_PER_PROOF * proof.units), MAX_WINDOW)
