"""The policy, by which relays act from then on: what it says of engines, models and samples, and when it is sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from hemostat.config.schema import Settings
from hemostat.control.stored_state import StoredState
from hemostat.engines.registry import ONLY, EngineRegistry
from hemostat.ipc.control_end import RelayLink
from hemostat.ipc.messages import Policy
from hemostat.measurement.outcome_sampling import OutcomeSampling
from hemostat.profiles.manager import ProfileManager
from hemostat.reference.monitor import ReferenceMonitor
from hemostat.reference.pair import ServedModels
from hemostat.scoring.answer_losses import AnswerLosses
from hemostat.scoring.limits import Breakers, CaptureSampling
from hemostat_calibration.passive import PassivePolicy


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


@dataclass(frozen=True, slots=True)
class EngineOffer:
    """The abilities that engines offer to requests now. `EngineOffers` makes it, `PolicyPublisher` reads it."""

    acknowledged: frozenset[str]
    """The versions that requests may ask for, if there is one engine."""
    held_by_engine: dict[str, frozenset[str]] | None
    """The versions that requests may ask for, by address; None if there is one engine."""
    adapters: frozenset[str]
    """The versions of the family `adapter` among them."""
    tap: bool
    """It is True if an engine's plugin reports."""
    tap_tokens: bool
    """It is True if the plugins hand out the tokens of answers."""
    tells_sets: bool
    """It is True if the plugins tell which ids a grammar allows."""
    nonce_prefix: str
    secret: str
    """The secret that signs keys of `vllm_xargs` now."""
    drained: frozenset[str]


class EngineOffers:
    """Decides what requests may ask of engines, by what these hold, have loaded and report."""

    def __init__(
        self, engines: EngineRegistry, adapters: LoadedAdapters, changes_weights: Callable[[str], bool]
    ) -> None:
        self._engines = engines
        self._adapters = adapters
        self._changes_weights = changes_weights

    def hold(self, versions: Sequence[str]) -> None:
        """Has engines hold these versions, and before them the adapters that are to stay loaded."""
        self._engines.reports.set_wanted([*self._adapters.hold, *versions])

    def tell_plugins(self, policy: Policy) -> None:
        """Has plugins sample by this policy, where no relays do."""
        self._engines.reports.passive.policy = PassivePolicy(
            rate=policy.shadow_rate if policy.scoring else 0.0,
            allow_on=policy.shadow_allow_on and policy.scoring,
            top_k=policy.shadow_top_k,
            max_tokens=policy.shadow_max_tokens,
            tap=policy.tap,
            grammars=policy.grammars,
            labels=policy.labels,
            salt=policy.salt,
            client_header=policy.client_header,
        )

    def names(self) -> list[str]:
        """Returns the names of the engines that requests go to; `ONLY` if there is one."""
        return list(self._engines.current()) if self._engines.several else [ONLY]

    def get(self, now: float) -> EngineOffer:
        """Returns what requests may ask for now. now: monotonic seconds."""
        reports = self._engines.reports
        by_engine = self._by_engine(now) if self._engines.several else None
        held = self._usable(reports.acknowledged(now), ONLY) if by_engine is None else frozenset[str]()
        available = held.union(*(by_engine or {}).values())
        return EngineOffer(
            acknowledged=held,
            held_by_engine=by_engine,
            adapters=self._adapters.ready & available,
            tap=bool(reports.live(now)),
            tap_tokens=reports.hands_out_answers(now),
            tells_sets=reports.tells_sets(now),
            nonce_prefix=reports.nonce_prefix,
            secret=reports.secrets.current(now),
            drained=self._engines.drained | self._engines.excluded,
        )

    def _by_engine(self, now: float) -> dict[str, frozenset[str]]:
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
        profiles = frozenset(version for version in held if not self._changes_weights(version))
        return profiles | self._adapters.ready_at(name)


class ScorableModels:
    """Decides if requests can be scored, by what the references and their circuit breakers say."""

    def __init__(self, monitor: ReferenceMonitor, breakers: Breakers, *, spools: bool = False) -> None:
        """spools: captures go to a spool first, whether they can be scored now or not."""
        self._monitor = monitor
        self._breakers = breakers
        self._spools = spools

    @property
    def served(self) -> ServedModels:
        return self._monitor.served

    @property
    def scored_again(self) -> frozenset[str]:
        """See `Policy.scored_again`."""
        return self._monitor.scored_again

    @property
    def full_vocabulary(self) -> bool:
        """It is True if a reference gives the logprobs of all ids, so that what a grammar allows can be scored."""
        return any(pair.reference is not None and pair.reference.full_vocabulary for pair in self.served.pairs)

    def scores(self, now: float) -> bool:
        """Returns True if some model's requests can be scored now. now: monotonic seconds."""
        if self._spools:
            return True
        referred = (pair for pair in self.served.pairs if pair.reference is not None)
        return self._monitor.ready and any(not self._breakers.open(pair.name, now) for pair in referred)


class SampledShares:
    """Says which part of the traffic is worth sending here, and whether answers come from the plugin."""

    def __init__(self, captures: CaptureSampling, outcomes: OutcomeSampling, losses: AnswerLosses) -> None:
        self._captures = captures
        self._outcomes = outcomes
        self._losses = losses

    @property
    def captures(self) -> float:
        """The part of `shadow.rate` that can be scored."""
        return self._captures.fraction

    @property
    def outcomes(self) -> float:
        """The part of the conversations whose outcomes are reported."""
        return self._outcomes.reported

    def prefers_plugin(self, now: float) -> bool:
        """Returns False while too many answers of the plugin get lost. now: monotonic seconds."""
        return not self._losses.paused(now)


class Changes:
    """Code that changes state on which the policy may depend calls `notify`; each subscriber then reads the current
    state."""

    def __init__(self) -> None:
        self._subscribers: list[Callable[[], None]] = []

    def subscribe(self, subscriber: Callable[[], None]) -> None:
        self._subscribers.append(subscriber)

    def notify(self) -> None:
        for subscriber in self._subscribers:
            subscriber()


SETTLE_SECONDS = 30.0
"""The longest time for which the first policy waits for engines and references. Engines report once a second, and a
reference on a server answers soon; one in process is loaded first.
"""


class PolicyPublisher:
    """Owns the last policy that was sent, and its generation. clock: monotonic seconds."""

    def __init__(
        self,
        settings: Settings,
        link: RelayLink,
        profiles: ProfileManager,
        engines: EngineOffers,
        models: ScorableModels,
        shares: SampledShares,
        stored_state: StoredState,
        clock: Callable[[], float],
    ) -> None:
        self.settings = settings
        """The settings, which may be replaced; they are used at the next `publish`."""
        self._link = link
        self._engines = engines
        self._profiles = profiles
        self._models = models
        self._shares = shares
        self._stored_state = stored_state
        self._clock = clock
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
        self._engines.hold(self._profiles.engine_versions())
        now = self._clock()
        policy = self._policy(now)
        if self._waits_until is not None:
            if now < self._waits_until and not self._is_settled(policy):
                return
            self._waits_until = None
        self._engines.tell_plugins(policy)
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
        engines = self._engines.names()
        held = bool(engines) and all(serving <= policy.held_at(engine) for engine in engines)
        return held and policy.serving_by_kind == stored.selected_by_kind

    def _policy(self, now: float) -> Policy:
        """Returns the policy without its generation. now: monotonic seconds."""
        shadow, calibration, profiles = self.settings.shadow, self.settings.calibration, self._profiles
        served, engines = self._models.served, self._engines.get(now)
        base = served.calibrated
        return Policy(
            generation=0,
            # Nothing is treated by evidence that came hours later.
            mode=profiles.serving.mode if self.settings.spool.score == "now" else "off",
            shadow_rate=shadow.rate * self._shares.captures,
            shadow_allow_on=shadow.allow_on,
            shadow_top_k=shadow.top_k,
            shadow_max_tokens=shadow.max_tokens,
            scoring=self._models.scores(now),
            tap=engines.tap,
            tap_tokens=engines.tap_tokens,
            prefer_plugin=self._shares.prefers_plugin(now),
            serving_by_kind=profiles.serving.version_by_kind,
            control_fraction=calibration.control_fraction,
            acknowledged=engines.acknowledged,
            held_by_engine=engines.held_by_engine,
            labels=frozenset(self.settings.labels),
            kinds=profiles.kinds.followed,
            unscorable_models=served.unscorable_adapters,
            scorable_models=served.scorable,
            calibrated_models=None if base is None else base.scorable,
            adapters=engines.adapters,
            base_models=None if base is None else base.names,
            answered_name="" if base is None else base.name,
            adapter_names=self.settings.adapter.enabled,
            default_model=served.pairs[0].name if served.pairs else "",
            nonce_prefix=engines.nonce_prefix,
            secret=engines.secret,
            salt=self._stored_state.salt,
            client_header=self.settings.evidence.client_header,
            scored_again=self._models.scored_again,
            grammars=self._models.full_vocabulary and engines.tells_sets,
            treat_unjudged=calibration.treat_unjudged,
            drained=engines.drained,
            outcome_fraction=self._shares.outcomes,
            openai_sampling_defaults=self.settings.upstream.openai_sampling_defaults,
        )
