"""All that is measured: of scored records, and of the outcomes of answers that relays report."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hemostat.config.schema import Settings
from hemostat.measurement import alarms, by_engine
from hemostat.measurement.alarms import Alarms
from hemostat.measurement.by_engine import ByEngine
from hemostat.measurement.dependence import Cycle
from hemostat.measurement.figures import MODELS
from hemostat.measurement.measurements import Measurements
from hemostat.measurement.outcome_sampling import OutcomeSampling
from hemostat.measurement.outcomes import Outcomes, ServedKinds
from hemostat.metrics.samples import AnySample
from hemostat.store.protocol import Snapshot, StoreWrites
from hemostat_calibration.elapsed import TimeBreak


class Measured:
    """Makes the parts, and hands them what is stored of them.

    wall: Unix time. requests_time: the Unix time of the requests whose records come; by default it is the same.
    """

    def __init__(
        self,
        settings: Settings,
        served: ServedKinds,
        sampling: OutcomeSampling,
        writes: StoreWrites,
        wall: Callable[[], float],
        requests_time: Callable[[], float] | None = None,
    ) -> None:
        requests_time = requests_time or wall
        floors = MODELS if settings.shadow.floor_fraction > 0.0 else ()
        control_fraction = settings.calibration.control_fraction
        self.cycle = Cycle(settings.evidence.cycle_seconds, requests_time)
        self.measurements = Measurements(settings.shadow.max_tokens, self.cycle)
        self.alarms = Alarms(settings.alarm, floors, writes, requests_time, self.cycle.seconds)
        self.by_engine = ByEngine(settings.alarm.engine_alpha, settings.upstream.affinity, writes, requests_time)
        self.outcomes = Outcomes(settings.evidence.client_share, control_fraction, served, writes, wall, sampling)

    def restore(self, snapshot: Snapshot) -> None:
        """Goes on from what an earlier run stored."""
        states = snapshot.states
        self.by_engine.restore(states.get(by_engine.STATE_KEY), states.get(by_engine.SPENT_KEY))
        events = [event for event in snapshot.events if event.get("decision") == "alarm"]
        self.alarms.restore(
            states.get(alarms.STATE_KEY), events, states.get(alarms.SPENT_KEY), states.get(alarms.FLOORS_KEY)
        )
        self.outcomes.restore(states, self.alarms.record_event)

    def after_break(self, time_break: TimeBreak) -> None:
        """Notes that the clock was set: what has to span a cycle of the traffic begins again, or goes on without the
        time that was lost."""
        self.cycle.after_break(time_break)
        self.alarms.after_break(time_break)
        self.by_engine.after_break(time_break)
        self.outcomes.after_break(time_break)

    def forget(self) -> None:
        """Forgets all, since other models are served or compared."""
        self.measurements.forget()
        self.alarms.forget()
        self.by_engine.forget()
        self.outcomes.forget()

    def save(self) -> None:
        """Queues a write of each part's state."""
        self.alarms.save()
        self.by_engine.save()
        self.outcomes.save()

    def samples(self) -> Iterator[AnySample]:
        yield from self.measurements.samples()
        yield from self.alarms.samples()
        yield from self.by_engine.samples()
        yield from self.outcomes.samples()
