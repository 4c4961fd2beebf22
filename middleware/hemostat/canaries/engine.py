"""One engine's canaries: which models it serves, when it is asked, and what its last replays say."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hemostat.canaries.client import CanaryClient, at_once
from hemostat.canaries.pace import HOUR_SECONDS, Pace, PaceState
from hemostat.canaries.texts import TextReading
from hemostat.canaries.variants import Sign
from hemostat.engines.engine import Engine
from hemostat.store.protocol import BlobKey
from hemostat_calibration.arrays import Floats
from hemostat_calibration.canaries import LASTING_REPLAYS, Comparison, Origin
from hemostat_calibration.canary_cause import Verdict
from hemostat_calibration.canary_short import ShortState

STATES_KEY = BlobKey("canary_engines")
"""The key of the engines' states in the store's blobs."""
MAX_ADAPTERS = 8
"""The largest number of adapters of an engine that are asked, by name; further ones are not asked."""
REQUEST_SECONDS = 60.0
BASELINE, ENGINES, TEXTS, SHORT, PREFIX, WEIGHTS = "baseline", "engines", "texts", "short", "prefix", "weights"
"""The names of what a replay is compared with: the baseline, the other engines, and the baselines of texts as clients
send them, of short sequences, of sequences behind a cached prefix, and of checksums of weights."""


@dataclass(slots=True)
class Reading:
    """The replays of one served model. Replays of all engines are numbered, in the order in which they end."""

    due: float = 0.0
    """The time of the next replay, monotonic seconds."""
    at: float = 0.0
    """The time of the last replay, Unix time."""
    number: int = 0
    """The number of the last replay."""
    values: Floats | None = None
    """The log-probabilities of the last replay."""
    found: dict[str, Comparison] = field(default_factory=dict)
    """The comparisons of the last replay, by what it was compared with."""
    suspected: dict[str, int] = field(default_factory=dict)
    """The replays after which it was too far from something, by what that was."""
    first: dict[str, Comparison] = field(default_factory=dict)
    """The comparisons of these replays: a later one has to show the same."""
    lasting: dict[str, tuple[float, int]] = field(default_factory=dict)
    """The differences of which it is not known if they are a mode's: the time of the last replay that was counted, Unix
    time, and the number of replays in a row, an hour apart."""
    since: dict[str, float] = field(default_factory=dict)
    """The statements: from what it is too far, and since when, Unix time."""
    reference: tuple[float, float] | None = None
    """The distances from the reference, in nats: the one of the baseline, and the present one."""
    cause: Verdict | None = None
    """The cause of what is stated, once it was looked for."""

    def judge(self, against: str, comparison: Comparison, numbers: Collection[int], now: float) -> None:
        """Judges one comparison. numbers: of the replays that are part of it. now: Unix time.

        The first one that is too far is a suspicion; the first one of replays that are all later and show the same is a
        statement. A difference that a mode of the engine's kernels may be is a statement once it has lasted for a week.
        """
        self.found[against] = comparison
        if not comparison.changed:
            self.suspected.pop(against, None)
            self.first.pop(against, None)
        elif against not in self.suspected:
            self._suspect(against, comparison, numbers)
        elif min(numbers) > self.suspected[against]:
            if against not in self.first or comparison.confirms(self.first[against]):
                self.since.setdefault(against, now)
            elif against not in self.since:
                self._suspect(against, comparison, numbers)
        at, count = self.lasting.get(against, (-np.inf, 0))
        if not comparison.differs:
            self.lasting.pop(against, None)
        elif now - at >= HOUR_SECONDS:
            self.lasting[against] = (now, count + 1)
            if count + 1 >= LASTING_REPLAYS:
                self.since.setdefault(against, now)
        if not comparison.changed and not comparison.differs:
            self.since.pop(against, None)
            self.cause = self.cause if self.since else None

    def _suspect(self, against: str, comparison: Comparison, numbers: Collection[int]) -> None:
        self.suspected[against], self.first[against] = max(numbers), comparison

    def to_store(self) -> Reading:
        """Returns what is stored. A suspicion comes before all replays of a later process."""
        return replace(self, due=0.0, number=0, values=None, suspected=dict.fromkeys(self.suspected, 0))

    @property
    def awaited(self) -> dict[str, int]:
        """The suspicions without a statement."""
        return {against: number for against, number in self.suspected.items() if against not in self.since}


@dataclass(frozen=True, slots=True)
class EngineState:
    """The state that outlasts the control process, so that its restart neither repeats replays beyond the budget nor
    forgets what they have found.

    readings: the suspicions, statements and differences that may be a mode's, by served name. texts, short,
    prefix: what the base model's texts, its short sequences and its sequences behind a cached prefix say.
    """

    pace: PaceState
    readings: Mapping[str, Reading]
    texts: TextReading = field(default_factory=TextReading)
    short: ShortState = field(default_factory=ShortState)
    prefix: Reading = field(default_factory=Reading)


@dataclass(frozen=True, slots=True)
class EngineStates:
    engines: Mapping[str, EngineState]


class EngineCanaries:
    """Owns what is known of one engine, and when it is asked. Implements `engines.engine.EnginePart`."""

    def __init__(
        self,
        engine: Engine,
        pace: Pace,
        stored: EngineState,
        *,
        sign: Sign,
        clock: Callable[[], float],
        on_end: Callable[[EngineCanaries], None],
    ) -> None:
        """stored: an earlier `state`. sign: see `VariantClient`. clock: monotonic seconds. on_end: called
        when the engine has left."""
        self.name = engine.name
        self.pace = pace
        self._engine = engine
        self._server = engine.connect(REQUEST_SECONDS)
        self._sign = sign
        self._clock = clock
        self._on_end = on_end
        self.readings = dict(stored.readings)
        """The readings by served name, the base model's first."""
        self.texts = replace(stored.texts)
        """The reading of the base model's texts."""
        self.short = stored.short
        """The state of the base model's short sequences."""
        self.prefix = replace(stored.prefix)
        """The reading of the base model's sequences behind a cached prefix."""
        self.now = Origin("")
        """The models that it serves, as `list_models` has found."""
        self.failure = ""
        """The reason why the last attempt could not tell, in one line."""
        self.differs = ""
        """The reason why its replays are not compared, in one line."""
        self.up = False
        self._boot = ""
        self.listed_at = -np.inf
        """The time when its models were listed, monotonic seconds."""
        self.not_before = 0.0
        """The time before which it is not asked, monotonic seconds."""
        self.task: asyncio.Task[None] | None = None
        """The work at this engine that was begun last."""

    @property
    def base(self) -> Reading | None:
        return next(iter(self.readings.values()), None)

    @property
    def is_outlier(self) -> bool:
        """True if one of its models has changed and differs from the other engines, or if it treats texts otherwise."""
        differs = any(reading.since.keys() >= {BASELINE, ENGINES} for reading in self.readings.values())
        return differs or self.texts.since is not None

    @property
    def idle(self) -> bool:
        return self.task is None or self.task.done()

    def look(self) -> None:
        """Looks at the engine: one that comes back, or whose plugin reports another boot id, is asked at once."""
        health, report = self._engine.health, self._engine.report(self._clock())
        self.pace.update(health.outstanding)
        up, boot = health.up > 0, "" if report is None else report.boot_id
        if (up and not self.up) or (boot and self._boot and boot != self._boot):
            self.listed_at, self.not_before = -np.inf, 0.0
            for reading in self.readings.values():
                reading.due = 0.0
            self.texts.due = self.prefix.due = 0.0
        self.up, self._boot = up, boot or self._boot

    async def list_models(self, wanted: str | None) -> None:
        """Asks which models it serves. wanted: the base model; None: the first. Raises ReferenceFailure."""
        base = await self._server.model(wanted)
        adapters = sorted(card.id for card in await self._server.models() if card.parent is not None)
        served = (base.id, *adapters[:MAX_ADAPTERS])
        self.readings = {name: self.readings.get(name, Reading()) for name in served}
        self.now = await self.client(base.id).origin(engine=self.name)

    @property
    def load(self) -> int:
        """The number of clients' requests in progress there now."""
        return self._engine.health.outstanding

    def client(self, model: str, *, at_any_load: bool = False) -> CanaryClient:
        gate = at_once if at_any_load else self.pace.wait
        return CanaryClient(self._server, model, gate, self._weights, sign=self._sign)

    async def post_long(self, body: dict[str, Any], seconds: float) -> None:
        """Sends a completion whose answer may take so long. Raises ReferenceFailure."""
        server = self._engine.connect(seconds)
        try:
            await server.post("/v1/completions", body, dict[str, Any])
        finally:
            await server.close()

    def _weights(self) -> str:
        report = self._engine.report(self._clock())
        return "" if report is None else report.weights

    def state(self) -> EngineState:
        kept = {
            name: reading.to_store()
            for name, reading in self.readings.items()
            if reading.suspected or reading.lasting or reading.since
        }
        return EngineState(self.pace.state(), kept, self.texts.to_store(), self.short, self.prefix.to_store())

    def forget(self) -> None:
        """Forgets what was found, since the set is replaced."""
        self.readings = {name: Reading() for name in self.readings}
        self.texts, self.short = TextReading(), replace(self.short, since=None, found=None)
        self.prefix = Reading()

    async def close(self) -> None:
        """Ends what is under way."""
        self._on_end(self)
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
        await self._server.close()


def served(origin: Origin) -> tuple[str, str]:
    """Returns the served name and the path of the origin's model."""
    return origin.model, origin.root


def text_statement(engine: str, model: str, texts: TextReading) -> str:
    """Returns what is wrong with an engine's texts, in one line; "" if nothing is."""
    if texts.since is None or texts.found is None:
        return ""
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(texts.since))
    return f"Canaries: {engine} ({model}) treats clients' texts otherwise, since {since}: {texts.found.summary}"


def short_statement(engine: str, model: str, short: ShortState) -> str:
    """Returns what short sequences say of an engine, in one line; "" if nothing is wrong."""
    if short.since is None or short.found is None:
        return ""
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(short.since))
    return f"Canaries: {engine} ({model}) has changed in short sequences, since {since}: {short.found.summary}"


def prefix_statement(engine: str, model: str, prefix: Reading) -> str:
    """Returns what sequences behind a cached prefix say of an engine, in one line; "" if nothing is wrong."""
    if BASELINE not in prefix.since:
        return ""
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(prefix.since[BASELINE]))
    return (
        f"Canaries: {engine} ({model}) has changed behind a prefix that is in its prefix cache, since {since}: "
        f"{prefix.found[BASELINE].summary}"
    )


def statement(
    engine: str, model: str, reading: Reading, then: Origin, now: Origin, cause: Verdict | None = None
) -> str:
    """Returns what is wrong at an engine, in one line with its figures; "" if nothing is."""
    if not reading.since:
        return ""
    against = BASELINE if BASELINE in reading.since else ENGINES
    what = "has changed" if against == BASELINE else "differs from the other engines"
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(reading.since[against]))
    parts = [f"Canaries: {engine} ({model}) {what}, since {since}: {reading.found[against].summary}"]
    parts += replace(then, model=now.model).changes(now)  # an adapter's name is another one
    if reading.reference is not None:
        parts.append("{:.3f} nats from the reference then, {:.3f} now".format(*reading.reference))
    if cause is not None:
        parts.append(f"cause: {cause.text}")
    return "; ".join(parts)
