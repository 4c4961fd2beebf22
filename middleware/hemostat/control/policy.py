"""Builds the policy, by which relays act from then on, and sends it when anything in it has changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from hemostat.config.schema import Settings
from hemostat.engines.registry import EngineRegistry
from hemostat.ipc.control_end import RelayLink
from hemostat.ipc.messages import Policy
from hemostat.measurement.outcome_sampling import OutcomeSampling
from hemostat.profiles.manager import ProfileManager
from hemostat.reference.monitor import ReferenceMonitor
from hemostat.scoring.answer_losses import AnswerLosses
from hemostat.scoring.limits import Breakers, CaptureSampling

SETTLE_SECONDS = 30.0
"""The longest time for which the first policy waits for engines and references. Engines report once a second, and a
reference on a server answers soon; one in process is loaded first.
"""


class LoadedAdapters(Protocol):
    """The part of `hemostat.adapters.serving.hosts.AdapterHosts` that the policy is made from."""

    @property
    def ready(self) -> frozenset[str]:
        """The versions of the family `adapter` that some engine can serve now."""
        ...

    def ready_at(self, name: str) -> frozenset[str]:
        """Returns the versions that the engine at one address can serve now; "": the engine at the only address."""
        ...

    @property
    def hold(self) -> Sequence[str]:
        """The versions that engines should keep loaded."""
        ...


class PolicyPublisher:
    """Owns the last policy that was sent, and its generation. clock: monotonic seconds. salt: the one in force."""

    def __init__(
        self,
        settings: Settings,
        link: RelayLink,
        engines: EngineRegistry,
        profiles: ProfileManager,
        monitor: ReferenceMonitor,
        breakers: Breakers,
        answer_losses: AnswerLosses,
        clock: Callable[[], float],
        salt: Callable[[], bytes],
        adapters: LoadedAdapters,
        outcomes: OutcomeSampling,
        captures: CaptureSampling,
    ) -> None:
        self.settings = settings
        """The settings, which may be replaced; they are used at the next `publish`."""
        self._link = link
        self._engines = engines
        self._profiles = profiles
        self._monitor = monitor
        self._breakers = breakers
        self._answer_losses = answer_losses
        self._clock = clock
        self._salt = salt
        self._adapters = adapters
        self._outcomes = outcomes
        self._captures = captures
        self._last: Policy | None = None
        self._waits_until: float | None = None
        """The time by which the first policy is sent at the latest; None: it was."""
        self.generation = 0
        """The number of policies that were sent."""

    def begin(self) -> None:
        """Sends the first policy once what served before can serve again, at most SETTLE_SECONDS later.

        Until then relays go on with the policy of the process before this one, so that a restart changes no arm.
        """
        self._waits_until = self._clock() + SETTLE_SECONDS
        self.publish()

    def publish(self) -> None:
        """Sends relays the policy if it is not the last one that was sent; has engines hold what it names."""
        self._engines.reports.set_wanted([*self._adapters.hold, *self._profiles.engine_versions()])
        now = self._clock()
        policy = self._policy(now)
        if self._waits_until is not None:
            if now < self._waits_until and not self._is_settled(policy):
                return
            self._waits_until = None
        if policy != self._last:
            self._last = policy
            self.generation += 1
            self._link.set_policy(msgspec.structs.replace(policy, generation=self.generation))

    def _is_settled(self, policy: Policy) -> bool:
        """Returns True if what is stored as serving can serve: the models are known, and every engine holds the
        profiles.
        """
        stored = self._profiles.serving
        if policy.mode != "auto" or not stored.selected_by_kind:
            return True
        serving = set(stored.selected_by_kind.values())
        engines = self._engines.current() if policy.held_by_engine is not None else [""]
        held = bool(engines) and all(serving <= policy.held_at(engine) for engine in engines)
        return held and policy.serving_by_kind == stored.selected_by_kind

    def _policy(self, now: float) -> Policy:
        """Returns the policy without its generation. now: monotonic seconds."""
        shadow, calibration, profiles = self.settings.shadow, self.settings.calibration, self._profiles
        served = self._monitor.served
        base = served.calibrated
        by_engine = self._held_by_engine(now) if self._engines.several else None
        held = self._usable(self._engines.reports.acknowledged(now), "") if by_engine is None else frozenset[str]()
        available = held.union(*(by_engine or {}).values())
        full = any(pair.reference is not None and pair.reference.full_vocabulary for pair in served.pairs)
        return Policy(
            generation=0,
            mode=profiles.serving.mode,
            shadow_rate=shadow.rate * self._captures.fraction,
            shadow_allow_on=shadow.allow_on,
            shadow_top_k=shadow.top_k,
            shadow_max_tokens=shadow.max_tokens,
            scoring=self._monitor.ready
            and any(pair.reference is not None and not self._breakers.open(pair.name, now) for pair in served.pairs),
            tap=bool(self._engines.reports.live(now)),
            tap_tokens=self._engines.reports.hands_out_answers(now),
            prefer_plugin=not self._answer_losses.paused(now),
            forced=profiles.serving.forced,
            serving_by_kind=profiles.serving.version_by_kind,
            control_fraction=calibration.control_fraction,
            acknowledged=held,
            held_by_engine=by_engine,
            labels=frozenset(self.settings.labels),
            kinds=profiles.kinds.followed,
            unscorable_models=served.unscorable_adapters,
            scorable_models=served.scorable,
            calibrated_models=None if base is None else base.scorable,
            adapters=self._adapters.ready & available,
            base_models=None if base is None else base.names,
            answered_name="" if base is None else base.name,
            adapter_names=self.settings.adapter.enabled,
            default_model=served.pairs[0].name if served.pairs else "",
            nonce_prefix=self._engines.reports.nonce_prefix,
            secret=self._engines.reports.secrets.current(now),
            salt=self._salt(),
            client_header=self.settings.evidence.client_header,
            scored_again=self._monitor.scored_again,
            grammars=full and self._engines.reports.tells_sets(now),
            treat_unjudged=calibration.treat_unjudged,
            drained=self._engines.drained,
            outcome_fraction=self._outcomes.reported,
            openai_sampling_defaults=self.settings.upstream.openai_sampling_defaults,
        )

    def _held_by_engine(self, now: float) -> dict[str, frozenset[str]]:
        """Returns the usable versions by engine, without engines that hold none: they would apply identity to a treated
        request.
        """
        held = self._engines.held(now)
        usable = {name: self._usable(held.get(name, frozenset()), name) for name in self._engines.current()}
        return {name: versions for name, versions in usable.items() if versions}

    def _usable(self, held: frozenset[str], name: str) -> frozenset[str]:
        """Returns what a request may ask for at one address. held: what the engine's logits processors hold, adapters
        among them.
        """
        is_adapter = self._profiles.catalogue.is_adapter
        return frozenset(version for version in held if not is_adapter(version)) | self._adapters.ready_at(name)
