"""The live parts of adapters, made and connected: what they learn about and judge, or why nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

from hemostat.adapters.live.client import AdapterLearner, AdapterTarget
from hemostat.adapters.live.folders import CheckpointFolders, FolderError, find_folders
from hemostat.adapters.live.judge import AdapterJudge, JudgeTarget
from hemostat.adapters.serving.hosts import AdapterHosts
from hemostat.config import packages
from hemostat.config.schema import Settings
from hemostat.engines.registry import EngineRegistry
from hemostat.ipc.turns import Turns
from hemostat.metrics.samples import Sample
from hemostat.profiles.decisions import Reason
from hemostat.profiles.manager import ProfileManager
from hemostat.reference.monitor import ReferenceMonitor
from hemostat.reference.pair import ModelPair
from hemostat.reference.protocol import ReferenceInfo
from hemostat_calibration.profiles.profile import CalibrationProfile


class _HostedProfiles:
    """Implements `hemostat.adapters.serving.host.AdapterProfiles`."""

    def __init__(self, profiles: ProfileManager) -> None:
        self._profiles = profiles

    def wanted(self) -> Sequence[str]:
        """In `observe` nothing is asked for, so nothing is loaded; nor before both models are known."""
        serving = self._profiles.serving
        serves = serving.mode == "auto" and serving.model is not None
        return self._profiles.lifecycle.adapter_versions() if serves else ()

    def get(self, version: str) -> CalibrationProfile | None:
        return self._profiles.catalogue.get(version)

    def reject(self, version: str, why: str) -> None:
        self._profiles.lifecycle.reject(version, why)


class Adapters:
    """Owns the process that makes adapters, the copies that judge them, and what is loaded at the engines."""

    def __init__(
        self,
        settings: Settings,
        profiles: ProfileManager,
        monitor: ReferenceMonitor,
        engines: EngineRegistry,
        on_change: Callable[[], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        turns: Turns | None = None,
    ) -> None:
        """turns: of heavy jobs; None: no other job takes any."""
        self._settings = settings
        self._profiles = profiles
        self._monitor = monitor
        self._on_change = on_change
        self.learner = AdapterLearner(settings.adapter, profiles.proposals, self._built, clock=clock, turns=turns)
        self.judge = AdapterJudge(profiles.catalogue.get, on_change)
        self.hosts = AdapterHosts(
            settings,
            engines,
            _HostedProfiles(profiles),
            copy=self.judge,
            base=lambda: monitor.served.calibrated_name,
            clock=clock,
            on_change=self._host_changed,
        )
        # The engines' slots are not known yet.
        profiles.serving.max_adapters = None if settings.adapter.enabled else 0

    def _built(self) -> None:
        self._need_copies()
        self._on_change()

    def _need_copies(self) -> None:
        """Has the judge load its copies early if an adapter serves or is tested: it needs them, and they take a while
        to load."""
        if self._profiles.lifecycle.adapter_versions():
            self.judge.need()

    def _host_changed(self) -> None:
        self._profiles.serving.max_adapters = self.hosts.capacity
        self._withdraw_above_limit()
        self._on_change()

    def _withdraw_above_limit(self) -> None:
        """Takes adapters out of service if the engines were started with fewer slots than adapters serve, or if
        adapters are disabled. They keep their place while the slots are not known, or while clients have taken them."""
        if self._profiles.serving.mode != "auto":
            return
        limit, lifecycle = self.hosts.limit, self._profiles.lifecycle
        if not self._settings.adapter.enabled:
            lifecycle.limit_adapters(0, Reason.SETTINGS, "adapter.enabled is false")
        elif limit is not None:
            why = f"the engines were started with slots for fewer adapters than serve: {limit} (--max-loras)"
            lifecycle.limit_adapters(limit, Reason.SLOT, why)

    def update(self) -> None:
        """Call after any change of the mode or the models."""
        self._withdraw_above_limit()
        settings, pair, serving = self._settings, self._monitor.served.calibrated, self._profiles.serving
        info = pair.reference if pair is not None else None
        if not settings.adapter.enabled:
            self._stop("adapter.enabled is false")
        elif serving.mode == "off":
            self._stop("calibration is off")
        elif pair is None or info is None or serving.model is None:
            self._stop("the reference is not ready")
        elif problem := packages.missing("lab"):
            self._stop(f"{problem}, where the control process runs", unavailable=True)
        else:
            try:
                folders = self._folders(pair, info)
            except FolderError as error:
                self._stop(str(error), unavailable=True)
                return
            digest = info.digest if info.folder is not None and Path(info.model).is_dir() else ""
            model, vocab_size = serving.model.name, serving.model.vocab_size
            self.judge.judge_about(JudgeTarget(folders, vocab_size, info.hidden_size, digest, settings.adapter.device))
            self._need_copies()
            self.learner.set_target(AdapterTarget(model, vocab_size, folders, digest))

    def _folders(self, pair: ModelPair, info: ReferenceInfo) -> CheckpointFolders:
        return find_folders(self._settings.adapter, info.model, info.folder, pair.root)

    def _stop(self, why: str, *, unavailable: bool = False) -> None:
        self.learner.stop(why, unavailable=unavailable)
        self.judge.stop(why, unavailable=unavailable)

    def needs_hidden_states(self, unit: bytes) -> bool:
        """Returns True if this unit's distances are computed from the reference's hidden states of the answer."""
        return self.judge.wants_hidden_states and self._profiles.may_need_distances(unit)

    def status(self) -> dict[str, Any]:
        """The status block `adapter`."""
        return self.learner.status() | {"judge": self.judge.status(), "engine": self.hosts.status()}

    def samples(self) -> Iterator[Sample]:
        """Nothing where adapters are not enabled."""
        if self._settings.adapter.enabled:
            yield from self.learner.samples()
            yield from self.judge.samples()
            yield from self.hosts.samples()

    def loops(self) -> list[Coroutine[Any, Any, None]]:
        """Returns the loops that have to run until they are cancelled; none if adapters are disabled."""
        if not self._settings.adapter.enabled:
            return []
        return [self.learner.run(), self.judge.run(), self.hosts.run()]
