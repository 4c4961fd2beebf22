"""One running test: of one profile in one kind of traffic. `guard.Guard` owns these, and gives each its alpha."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from hemostat_calibration.elapsed import TimeBreak, elapsed, has_jumped
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.guard.decisions import Admission, Figure, Role
from hemostat_calibration.guard.harm import HarmSum
from hemostat_calibration.guard.wealth import (
    FRACTIONS,
    MIN_CLIENTS,
    Floats,
    log_bound,
    log_evidence,
    log_factors,
    log_proof,
    without_any,
)
from hemostat_calibration.statistics.dependence import (
    MAX_CLIENTS,
    MIN_BATCHES_OF_BETS,
    MIN_EFFECTIVE,
    BatchMeans,
    client_row,
    known_row,
)
from hemostat_calibration.statistics.running_mean import RunningMean

MAX_UNITS = 4096
"""The largest number of units that a test remembers, counted and refused ones."""
MIN_UNITS_OF_FEW_CLIENTS = 30
"""The number of units before which nothing is decided while fewer than `MIN_CLIENTS` clients are seen: else the first
few units, of whoever sends most, could decide before the others are met."""
MAX_MET = 4
"""A window is over when so many times its units were met, most of them refused: clients that are seen no more would
else keep the window open."""
DIGEST_BYTES = 4
"""The bytes of a unit's digest that are remembered. Two units with the same digest count as one, which has a
probability of 1e-6 for each unit.
"""
DEFAULT_TOKEN_CAP = 512.0
"""The number of tokens that is the cap while no answer's length is known; see `KindTest.token_cap`."""

GAIN_TOKENS, TOKENS, SQUARED_TOKENS = range(3)
"""The places of the sums of each client's units: gain times tokens, tokens, tokens squared."""
KL_GAIN, KL_GAIN_TOKENS = range(2)
"""The places of the sums of each client's units: gain in KL, the same times tokens."""
MAX_KL_GAIN = 1e9
"""The size, in nats, at which an infinite loss counts in `KindTest.kl_sums`, so that no number of gains outweighs
it.
"""


@dataclass(slots=True)
class KindTest:
    """Counts units once each, bets on them, and limits the clients' shares.

    role, width, number, weight: see `Guard`; weight is of a candidate's kind, in the closed test.
    figure: what the gains are of. Fixed: gains of another figure are refused.
    window: units; 0 for a candidate.
    token_cap: harm by token weighs a unit by min(tokens, token_cap)/token_cap. Fixed before the first unit.
    wealth: float64 [MAX_CLIENTS, F], sums by client of log factors of the bets that the gain's lower end is above 0.
    harm: of a serving profile, the evidence that the gain's upper end is below 0, of this window and those before.
    opposing: float64 [F], sum of log factors of the units that were refused for their client's share; of a candidate.
    sums: float64 [MAX_CLIENTS, 3]. counts: units by client. places: client -> row.
    kl_sums: float64 [MAX_CLIENTS, 2], nats; of a test whose figure is the total variation.
    supported: latched, for a serving profile. gain: by unit, of the end that counts against the action; it is shown,
        and decides nothing.
    batches: of a candidate's gains, for their variance inflation; also of units that the full test does not count.
    last, elapsed: when the last of these was, seconds, and the time that they span.
    inherited: of a serving profile, the variance inflation of the gains of its proof: its own may change, and a change
        looks like dependence.
    evidence: v̂ and the log evidence with it, where it is known since the last unit.
    """

    role: Role
    width: float
    number: int
    weight: float = 1.0
    window: int = 0
    token_cap: float = DEFAULT_TOKEN_CAP
    figure: Figure = Figure.NATS
    frozen: bool = False
    supported: bool = False
    refused: int = 0
    units: int = 0
    tokens: int = 0
    gain: RunningMean = field(init=False)
    places: dict[bytes, int] = field(default_factory=dict)
    counts: list[int] = field(default_factory=list)
    counted: dict[bytes, None] = field(default_factory=dict)
    wealth: Floats = field(default_factory=lambda: np.zeros((MAX_CLIENTS, len(FRACTIONS))))
    harm: HarmSum | None = None
    opposing: Floats = field(default_factory=lambda: np.zeros(len(FRACTIONS)))
    sums: Floats = field(default_factory=lambda: np.zeros((MAX_CLIENTS, 3)))
    kl_sums: Floats = field(default_factory=lambda: np.zeros((MAX_CLIENTS, 2)))
    batches: BatchMeans = field(default_factory=lambda: BatchMeans.of(1))
    last: float = 0.0
    elapsed: float = 0.0
    inherited: float = 1.0
    evidence: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.width) and self.width > 0.0):
            raise InvalidArgumentError(f"width is {self.width}: it must be a number above 0")
        if self.figure is Figure.TOTAL_VARIATION and self.width != 1.0:
            raise InvalidArgumentError(f"width is {self.width}: that of the total variation is 1")
        self.gain = RunningMean(-self.width, self.width)
        if self.role is Role.SERVING and self.harm is None:
            self.harm = HarmSum(self.number)

    @property
    def clients(self) -> int:
        return len(self.counts)

    @property
    def window_is_over(self) -> bool:
        return self.role is Role.SERVING and (self.units >= self.window or self._ends_window(more=0))

    def may_decide(self, seconds: float = 0.0) -> bool:
        """Returns True if the test may decide.

        seconds: the time that a candidate's gains have to span. If they have to span none, `MIN_EFFECTIVE` of them are
        enough to know how much they depend on each other, by the v̂ that is taken of them.
        """
        if self.role is Role.CANDIDATE:
            effective = self.batches.effective()[0] if seconds else self.batches.units / self.own_inflation()
            if not self.spans(seconds) or effective < MIN_EFFECTIVE:
                return False
        return self.clients >= MIN_CLIENTS or self.units >= MIN_UNITS_OF_FEW_CLIENTS

    def spans(self, seconds: float) -> bool:
        """Returns True if the gains do, from the first one to the last."""
        return self.elapsed >= seconds

    def own_inflation(self, in_cycles: bool = False) -> float:
        """Returns v̂ of the gains, 1 or more; 1 if too few are known.

        in_cycles: take the upper limit of v̂ of sums as long as the test, whether independence is refuted or not: few
        units refute what the gains of a cycle have in common.
        """
        if self.role is Role.SERVING:
            return self.inherited
        if not in_cycles:
            return float(self.batches.inflation_of_bets(MIN_BATCHES_OF_BETS)[0])
        result = float(self.batches.inflation_of_sums(self.units)[0])
        return result if math.isfinite(result) else 1.0

    def update_dependence(self, gain: float, now: float, longest_gap: float) -> None:
        """Takes a gain of the kind, whether it counts or not (`MAX_UNITS`), for its variance inflation. now: its time,
        seconds. longest_gap: what is counted at most of the time since the last one; where the clock has jumped, the
        time begins anew."""
        if self.last > 0.0:
            passed = elapsed(self.last, now, longest_gap)
            self.elapsed = 0.0 if has_jumped(self.last, now) else self.elapsed + passed
        self.last = now
        self.batches = self.batches.update(np.array([gain / self.width]))
        self.evidence = None

    def after_break(self, time_break: TimeBreak, needed: float) -> None:
        """Notes that the time was set. needed: seconds that the gains have to span; if they do not yet, they begin
        again."""
        if self.last > 0.0:
            self.last = time_break.seen(self.last)
        if time_break.anew and not self.spans(needed):
            self.elapsed = 0.0

    def admit(self, unit: bytes, client: bytes, share: float) -> Admission:
        """Returns the decision whether the unit may count. The answer depends on whose the unit is, and not on what it
        showed.

        A client's share of the units is at most `share`, rounded up to a whole unit. A unit that is refused for that
        does not count later either.
        """
        if self.frozen:
            return Admission.FROZEN
        if self.has_counted(unit):
            return Admission.COUNTED
        if self.units >= MAX_UNITS or len(self.counted) >= MAX_UNITS:
            return Admission.FULL
        if self._ends_window():
            return Admission.ADMITTED
        place = known_row(self.places, client)
        if len(self.counts) >= MIN_CLIENTS and place is not None and self.counts[place] > share * self.units:
            self.refused += 1
            if unit:
                self.counted[_digest(unit)] = None
            return Admission.CLIENT_SHARE
        return Admission.ADMITTED

    def has_counted(self, unit: bytes) -> bool:
        """Returns True if the unit has counted, or was refused."""
        return bool(unit) and _digest(unit) in self.counted

    def update(
        self,
        unit: bytes,
        client: bytes,
        lower: float,
        upper: float,
        tokens: int,
        kl_gain: float | None = None,
        now: float = 0.0,
        longest_gap: float = math.inf,
    ) -> None:
        """Counts one unit. kl_gain, now: see `Guard.update`. longest_gap: see `update_dependence`. Raises
        InvalidArgumentError for a gain outside of ±width or of another figure, or a unit that has counted."""
        width = self.width
        self._require(Figure.NATS if kl_gain is None else Figure.TOTAL_VARIATION)
        if kl_gain is not None and math.isnan(kl_gain):
            raise InvalidArgumentError("kl_gain is NaN: it must be a number, or minus infinity")
        slack = 1e-9 * width
        if not lower <= upper + 1e-9:
            raise InvalidArgumentError(f"gain is between {lower} and {upper}: lower must not be above upper")
        if not lower >= -width - slack or (self.role is Role.SERVING and not upper <= width + slack):
            raise InvalidArgumentError(f"gain is between {lower} and {upper}: it must be within ±{width}")
        if tokens < 1:
            raise InvalidArgumentError(f"tokens is {tokens}: it must be 1 or more")
        if unit:
            digest = _digest(unit)
            if digest in self.counted:
                raise InvalidArgumentError("the unit has counted in this test: ask `admit` first")
            self.counted[digest] = None
        place = client_row(self.places, client)
        if place == len(self.counts):
            self.counts.append(0)
        self.counts[place] += 1
        self.wealth[place] += log_factors(_within_one(lower / width))
        shown = lower
        if self.harm is not None:
            shown = upper
            loss = _within_one(-upper / width)
            self.harm.update(client, loss, loss * min(tokens / self.token_cap, 1.0))
        else:
            self.update_dependence(lower, now, longest_gap)
        sums = self.sums[place]
        sums[GAIN_TOKENS] += shown * tokens
        sums[TOKENS] += tokens
        sums[SQUARED_TOKENS] += tokens * tokens
        if kl_gain is not None:
            bounded = min(max(kl_gain, -MAX_KL_GAIN), MAX_KL_GAIN)
            self.kl_sums[place, KL_GAIN] += bounded
            self.kl_sums[place, KL_GAIN_TOKENS] += bounded * tokens
        self.units += 1
        self.tokens += tokens
        self.gain = self.gain.update(min(max(shown, -width), width))
        self.evidence = None

    def oppose(self, lower: float, figure: Figure = Figure.NATS) -> None:
        """Notes a unit that was refused for its client's share. Raises InvalidArgumentError for a gain below −width, or
        of another figure."""
        self._require(figure)
        if self.role is not Role.CANDIDATE:
            raise InvalidArgumentError("only a candidate's test notes what it refused")
        if not lower >= -self.width * (1.0 + 1e-9):
            raise InvalidArgumentError(f"gain is {lower}: it must be at least −{self.width}")
        self.opposing += log_factors(_within_one(lower / self.width))
        self.evidence = None

    def log_e(self, inflation: float) -> float:
        """Returns the logarithm of the evidence that the gain is above 0 and that needs no single client: to begin, or
        for what serves (see `wealth`). inflation: v̂, 1 or more."""
        v = inflation
        if self.evidence is None or self.evidence[0] != v:
            by_client = self.wealth[: self.clients]
            if self.role is Role.CANDIDATE:
                result = float(log_proof(by_client, self.clients, self.opposing, v))
            else:
                result = log_evidence(by_client, self.clients, v)
            self.evidence = v, result
        return self.evidence[1]

    def reaches(self, needed: float, inflation: Callable[[], float], seconds: float = 0.0) -> bool:
        """Returns True if the log evidence is `needed` or more, and may decide. Most units need no evaluation of the
        evidence or of v̂. inflation: returns v̂. seconds: see `may_decide`.
        """
        if log_bound(self.wealth[: self.clients]) < needed:
            return False
        return self.may_decide(seconds) and self.log_e(inflation()) >= needed

    def harm_reaches(self, needed: float, inflation: float) -> bool:
        """Returns True if the log evidence that a serving profile's gain is below 0 is `needed` or more, and may
        decide.
        """
        harm = self.harm
        if harm is None or not (harm.clients >= MIN_CLIENTS or harm.units >= MIN_UNITS_OF_FEW_CLIENTS):
            return False
        return harm.reaches(needed, inflation)

    def log_harm(self, inflation: float) -> float:
        """Returns the logarithm of the evidence of harm; 0 for a candidate."""
        return self.harm.log_e(inflation) if self.harm is not None else 0.0

    @property
    def mean_gain_by_token(self) -> float:
        return float(self.sums[:, GAIN_TOKENS].sum()) / self.tokens if self.units else math.nan

    @property
    def gains_by_token(self) -> bool:
        """It is True if the gain by token is above 0 without any one client. No error is controlled here."""
        return bool((without_any(self.sums[: self.clients, GAIN_TOKENS]) > 0.0).all()) if self.units else False

    @property
    def gains_in_kl(self) -> bool:
        """It is True if the gain in KL is above 0, too, by unit and by token, without any one client. It is always True
        if gains are in nats. No error is controlled here.
        """
        if self.figure is Figure.NATS:
            return True
        sums = self.kl_sums[: self.clients]
        return bool(self.units) and all((without_any(sums[:, which]) > 0.0).all() for which in range(sums.shape[1]))

    @property
    def mean_kl_gain(self) -> float | None:
        """By unit, nats; None if gains are in nats themselves. -inf where a unit's is."""
        return self._mean_kl(KL_GAIN, self.units)

    @property
    def mean_kl_gain_by_token(self) -> float | None:
        return self._mean_kl(KL_GAIN_TOKENS, self.tokens)

    def _mean_kl(self, which: int, count: int) -> float | None:
        if self.figure is Figure.NATS or not count:
            return None
        total = float(self.kl_sums[:, which].sum())
        return total / count if total > -0.5 * MAX_KL_GAIN else -math.inf

    @property
    def typical_tokens(self) -> float:
        """The length of the answer in which a token stands, on average over tokens; no one client can make it large."""
        sums = self.sums[: self.clients]
        if not self.units:
            return DEFAULT_TOKEN_CAP
        tokens = without_any(sums[:, TOKENS])
        known = tokens > 0.0
        return float((without_any(sums[:, SQUARED_TOKENS])[known] / tokens[known]).min())

    def _require(self, figure: Figure) -> None:
        if figure is not self.figure:
            raise InvalidArgumentError(f"the gain is of {figure}, the test's are of {self.figure}: they do not add up")

    def _ends_window(self, more: int = 1) -> bool:
        """Returns True if `more` further units end the window of a serving profile because so many units were refused.
        Such a unit is admitted whoever sends it, so that the end is noticed.
        """
        met, remembered = self.units + self.refused + more, len(self.counted) + more
        return self.role is Role.SERVING and (met >= MAX_MET * self.window or remembered >= MAX_UNITS)


def _within_one(x: float) -> float:
    return min(max(x, -1.0), 1.0)


def _digest(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=DIGEST_BYTES).digest()
