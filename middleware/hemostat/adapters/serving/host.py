"""`AdapterHost`: loads adapters at one engine, and says which of them requests to it may ask for.

Invariants:
- A version may be asked for only while the engine is known to have it loaded, and both probes have passed: rows
  without an adapter are left alone, with exactly what is loaded now, and the engine is the model that our copy is,
  with and without this version. Whatever is not known means no.
- All of that is about one start of the server: a new engine, or a name that has vanished, ends it.
- What is replaced is unloaded first. A slot is left free (`slots`).
- What is known of a version is a record with a state (`versions`). A new start of the engine ends it.
- No request waits for anything here, and nothing is asked of the server while no adapter is wanted or loaded.

One address may stand for several engines (a router, data parallelism): all of them have to report that they hold it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any, Protocol

from hemostat.adapters.serving import slots
from hemostat.adapters.serving.loading import Loader, SharedFolder
from hemostat.adapters.serving.probes import Probes
from hemostat.adapters.serving.probing import ModelCopy, Prober
from hemostat.adapters.serving.server import Listed, listed, lora_enabled, max_loras, started
from hemostat.adapters.serving.setting import without_lora
from hemostat.adapters.serving.versions import Versions, VersionState
from hemostat.engines.engine import Engine
from hemostat.engines.messages import RankReport
from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat.reference.protocol import FailureReason, ReferenceFailure
from hemostat.reference.server import VllmServer
from hemostat_calibration.profiles.adapter import max_rank
from hemostat_calibration.profiles.profile import CalibrationProfile

log = logging.getLogger("hemostat.adapters")

POLL_SECONDS = 2.0
"""Between two looks at the server, and at what is wanted."""
SOON_SECONDS = 0.5
"""The same after something was changed at the server."""
REQUEST_SECONDS = 60.0
MAX_TIMEOUTS = 3
"""Lists of models in a row that did not come in time, after which the server counts as down."""


class HostState(StrEnum):
    IDLE = "idle"
    """No adapter is wanted."""
    WAITING = "waiting"
    """The upstream or the copy of the model does not answer, or engines have not reported yet."""
    LOADING = "loading"
    PROBING = "probing"
    READY = "ready"
    """The server has at least one adapter that may be asked for."""
    UNUSABLE = "unusable"
    """None may be; `unusable` says why."""


class AdapterProfiles(Protocol):
    """The part of the profiles that the host needs."""

    def wanted(self) -> Sequence[str]:
        """Versions of adapters that should be loaded, most important first."""
        ...

    def get(self, version: str) -> CalibrationProfile | None: ...

    def reject(self, version: str, why: str) -> None:
        """The engine does not apply this version as it should."""
        ...


class AdapterHost:
    """Lives in the control process's event loop. Implements `engines.engine.EnginePart`.

    engine: the adapters are a part of it. folder: see `Loader`. copy: our copy of the model that profiles are for, None
    where there is none: then only isolation is probed. base: the served name of that model; "" while it is not known.
    clock: monotonic seconds. on_change: called after every change of `ready`, `capacity`, `limit` or `hold`.
    """

    def __init__(
        self,
        engine: Engine,
        profiles: AdapterProfiles,
        folder: SharedFolder | None,
        *,
        copy: ModelCopy | None,
        base: Callable[[], str],
        clock: Callable[[], float],
        on_change: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._reports = engine.reports
        self._profiles = profiles
        self._loader = Loader(folder, self._reports_adapters)
        self._base = base
        self._clock = clock
        self._on_change = on_change
        self._probes = Probes(copy, clock)
        self._prober: Prober | None = None
        self._ready: frozenset[str] = frozenset()
        self._boots: frozenset[str] = frozenset()
        """Engines that have reported since the last start that was noticed."""
        self._loaded: frozenset[str] = frozenset()
        """Our versions that the server listed at the last look."""
        self._started: str | None = None
        """When the server began, where no engine reports."""
        self._slots: int | None = None
        """--max-loras, where no engine reports it."""
        self._timeouts = 0
        self._versions = Versions()
        self._task: asyncio.Task[None] | None = None
        self.state = HostState.IDLE
        self.detail = ""
        """One line about the state, where there is more to say."""
        self.capacity: int | None = None
        """Adapters that may serve at a time; None while that is not known."""
        self.limit: int | None = None
        """`slots.Room.limit`."""
        self.hold: tuple[str, ...] = ()
        """Versions that engines should keep loaded."""

    # --- what others read ------------------------------------------------------------------------------------------

    @property
    def ready(self) -> frozenset[str]:
        """The versions that requests may ask for now."""
        now = self._clock()
        if not self._ready or not self._reports.known(now):
            return frozenset()
        reports = self._reports.live(now)
        if slots.boots(reports) - self._boots or not slots.complete(reports) or slots.room(reports, 0).problem:
            return frozenset()
        return self._ready & slots.held_everywhere(reports, self._ready)

    def status(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "state": self.state.value,
            "detail": self.detail,
            "way": self._loader.way.value if self._loader.way is not None else None,
            "capacity": self.capacity,
            "wanted": list(self._profiles.wanted()),
            "loaded": sorted(self._loaded),
            "ready": sorted(self.ready),
            "failures": self._reasons(),
            "probes": self._probes.report(),
            "probe_tokens": self._prober.tokens if self._prober is not None else 0,
        }

    def samples(self) -> Iterator[Sample]:
        counts = {"wanted": len(self._profiles.wanted()), "loaded": len(self._loaded), "ready": len(self.ready)}
        for state, count in counts.items():
            yield Sample(names.ADAPTERS, (state,), count)
        yield from self._loader.samples()
        yield from self._probes.samples()

    @property
    def rejected(self) -> Mapping[str, str]:
        """Versions whose probe has failed since the engine's last start -> why."""
        return self._versions.reasons(VersionState.REJECTED)

    def _reasons(self) -> dict[str, str]:
        """Returns why versions are not loaded or not used."""
        return {**self._versions.reasons(VersionState.FAILED), **self._versions.reasons(VersionState.REJECTED)}

    # --- the loop --------------------------------------------------------------------------------------------------

    def keep_running(self) -> None:
        """Begins `run`, if it is not running. Raises what it has raised."""
        if self._task is not None and self._task.done():
            ended, self._task = self._task, None
            ended.result()  # as any other loop of the control process: its error ends it
        if self._task is None:
            self._task = asyncio.create_task(self.run())

    async def close(self) -> None:
        """Ends `run`."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def run(self) -> None:
        """Until cancelled, or until the address is no engine of the upstream any more."""
        try:
            server = self._engine.connect(REQUEST_SECONDS)
        except ReferenceFailure as failure:
            self._unreachable(failure)
            return
        self._prober = Prober(server)
        try:
            while True:
                pause = await self._step(server, self._prober)
                await asyncio.sleep(pause)
        finally:
            await server.close()

    async def _step(self, server: VllmServer, prober: Prober) -> float:
        """One look at the server, and at most one change or probe there. Returns the seconds until the next step."""
        wanted = list(dict.fromkeys(self._profiles.wanted()))
        if not wanted and not self._loaded:
            self._set_hold(())
            self._set(HostState.IDLE, self.capacity)
            return POLL_SECONDS
        try:
            result = listed(await server.models())
        except ReferenceFailure as failure:
            self._unreachable(failure)
            return POLL_SECONDS
        self._timeouts = 0
        if not self._reports.known(self._clock()):
            self._set(HostState.WAITING, self.capacity, "it is not known yet which engine answers here")
            return SOON_SECONDS
        reports = self._reports.live(self._clock())
        self._notice_restart(result, reports, None if reports else await started(server))
        if self._ready and not self._probes.passed(list(self._ready), result.ours | result.others):
            self._set(HostState.PROBING, self.capacity)  # another client has loaded or unloaded an adapter
        base = self._base() or next(iter(result.base), "")
        if not base or not slots.complete(reports):
            self._set(HostState.WAITING, self.capacity, "" if base else "the upstream serves no model yet")
            return POLL_SECONDS
        if self._slots is None and not any(report.lora for report in reports):
            if await lora_enabled(server) is False:
                # To be asked for one, vLLM logs a traceback of its engine each time.
                ranks = [
                    max_rank(profile) for version in wanted if (profile := self._profiles.get(version)) is not None
                ]
                self._set(HostState.UNUSABLE, 0, without_lora(max(ranks, default=1)))
                return POLL_SECONDS
            self._slots = await max_loras(server)
        room = slots.room(reports, len(result.others), self._slots)
        self._set_limit(room.limit)
        if problem := room.problem or self._probes.problem:
            self._set(HostState.UNUSABLE, 0, problem)
            return POLL_SECONDS
        target = self._target(wanted, room)
        self._set_hold(target)
        if await self._unload(server, result.ours, target, room):
            return SOON_SECONDS
        present = slots.held_everywhere(reports, result.ours)
        if await self._load_next(server, prober, base, [v for v in target if v not in present], room):
            return SOON_SECONDS
        return await self._probe(prober, base, [v for v in target if v in present], result, room)

    def _set(
        self, state: HostState, capacity: int | None, detail: str = "", *, ready: frozenset[str] = frozenset()
    ) -> None:
        if detail and detail != self.detail and state in {HostState.UNUSABLE, HostState.WAITING}:
            log.log(
                logging.ERROR if state is HostState.UNUSABLE else logging.WARNING, "adapters: %s: %s", state, detail
            )
        changed = (ready, capacity) != (self._ready, self.capacity)
        self.state, self.detail, self._ready, self.capacity = state, detail, ready, capacity
        if changed:
            self._on_change()

    def _set_limit(self, limit: int | None) -> None:
        if limit != self.limit:
            self.limit = limit
            self._on_change()

    def _set_hold(self, versions: tuple[str, ...]) -> None:
        if versions != self.hold:
            self.hold = versions
            self._on_change()

    def _unreachable(self, failure: ReferenceFailure) -> None:
        self._timeouts += failure.reason is FailureReason.TIMEOUT
        if failure.reason is FailureReason.UNAUTHORIZED:
            self._set(HostState.UNUSABLE, 0, f"{failure}; set upstream.api_key")
        elif failure.reason is not FailureReason.TIMEOUT or self._timeouts >= MAX_TIMEOUTS:
            self._set(HostState.WAITING, self.capacity, str(failure))

    def _notice_restart(self, adapters: Listed, reports: Sequence[RankReport], began: str | None) -> None:
        """Forget what was found about an earlier start of the server.

        began: where no engine reports. By the names alone a restart may go unnoticed: the first request for a version
        has the server's resolver load it again.
        """
        boots = slots.boots(reports)
        again = None not in (began, self._started) and began != self._started
        if again or self._loaded - adapters.ours or (self._boots and boots - self._boots):
            if self._loaded:
                log.warning("adapters: the upstream was restarted or has lost one; they are loaded and probed again")
            self._set(HostState.LOADING, self.capacity)
            self._boots, self._slots = frozenset(), None
            self._loader.begin_anew()
            self._versions.begin_anew()
            self._probes.begin_anew()
        self._started = began or self._started
        self._boots |= boots
        self._loaded = self._own(adapters.ours)

    def _reports_adapters(self) -> bool:
        return any(report.lora for report in self._reports.live(self._clock()))

    def _own(self, versions: Iterable[str]) -> frozenset[str]:
        """Returns the versions that are ours, without the versions of another Hemostat that shares the server."""
        return frozenset(v for v in versions if v in self._loaded or self._profiles.get(v) is not None)

    def _target(self, wanted: Sequence[str], room: slots.Room) -> tuple[str, ...]:
        """Returns the versions that should be loaded: the most important ones that fit."""
        usable = []
        for version in wanted:
            profile = self._profiles.get(version)
            if profile is None or self._versions.state(version) is VersionState.REJECTED:
                continue
            rank = max_rank(profile)
            if room.max_rank is not None and rank > room.max_rank:
                setting = f"set --max-lora-rank {slots.rank_setting(rank)}"
                self._failed(version, f"rank {rank} is above --max-lora-rank {room.max_rank}: {setting}")
                continue
            usable.append(version)
        return tuple(usable[: 1 if room.capacity is None else room.capacity])

    # --- loading ---------------------------------------------------------------------------------------------------

    async def _unload(
        self, server: VllmServer, present: frozenset[str], target: Sequence[str], room: slots.Room
    ) -> bool:
        """Unload what is not wanted; adapters of unknown origin only where there is no room. True if something was."""
        unwanted = present - set(target)
        mine = self._own(unwanted)
        if room.capacity is not None and len(unwanted - mine) + len(target) > room.capacity:
            mine = unwanted
        unloaded = False
        for version in sorted(mine):
            self._set(HostState.LOADING, self.capacity)
            if await self._loader.unload(server, version):
                unloaded = True
                self._loaded -= {version}
                self._probes.forget(version)
        return unloaded

    async def _load_next(
        self, server: VllmServer, prober: Prober, base: str, missing: Sequence[str], room: slots.Room
    ) -> bool:
        """Load the first one whose time has come. False where none was loaded."""
        now = self._clock()
        version = next((v for v in missing if self._versions.may_load(v, now)), None)
        profile = self._profiles.get(version) if version is not None else None
        if version is None or profile is None:
            return False
        # A slot is freed once the last request that uses it has ended.
        occupied = (set(report.adapters) - set(missing) for report in self._reports.live(now))
        if room.capacity is not None and max(map(len, occupied), default=0) >= room.capacity:
            return False
        if self.state is not HostState.UNUSABLE:  # a version that could not be loaded is tried again
            self._set(HostState.LOADING, self.capacity)
        isolated, self._probes.isolated_with = self._probes.isolated_with, None
        # Also after it was loaded: where several engines share the address, another request reaches the next one.
        self._versions.begin_load(version, now)
        if why := await self._loader.load(server, prober, profile, base, {*self._loaded, *self.hold}):
            self._failed(version, why)
            self._probes.isolated_with = isolated
            return False
        self._versions.loaded(version)
        return True

    def _failed(self, version: str, why: str) -> None:
        if self._versions.failed(version, why):
            log.error("adapter %s: %s", version, why)

    # --- probes ----------------------------------------------------------------------------------------------------

    async def _probe(
        self, prober: Prober, base: str, present: Sequence[str], adapters: Listed, room: slots.Room
    ) -> float:
        """Do the next probe that is due, then set what may be asked for."""
        loaded = adapters.ours | adapters.others
        if self._probes.due(present, loaded):
            if not self._probes.passed(present, loaded):
                self._set(HostState.PROBING, self.capacity)
            rejected = await self._probes.run(prober, base, present, loaded, len(self._boots))
            for version, why in rejected.items():
                log.error("adapter %s is not used: %s", version, why)
                self._versions.reject(version, why)
                self._profiles.reject(version, why)
            return 0.0
        passed = self._probes.passed(present, loaded)
        ready = frozenset(version for version in passed if self._profiles.get(version) is not None)
        capacity = 1 if room.capacity is None else room.capacity
        if ready:
            self._set(HostState.READY, capacity, ready=ready)
        elif present:
            self._set(HostState.WAITING, self.capacity, f"a probe has not passed yet: {self._probes.last}")
        else:
            why = next(iter(self._reasons().values()), "")
            self._set(HostState.UNUSABLE if why else HostState.LOADING, 0 if why else self.capacity, why)
        return POLL_SECONDS
