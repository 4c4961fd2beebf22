"""Builds the policy, by which relays act from then on, and sends it when anything in it has changed."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from hemostat.config.schema import Settings
from hemostat.control.policy_parts import EngineOffers, SampledShares, ScorableModels
from hemostat.control.stored_state import StoredState
from hemostat.ipc.control_end import RelayLink
from hemostat.ipc.messages import Policy
from hemostat.profiles.manager import ProfileManager

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
            mode=profiles.serving.mode,
            shadow_rate=shadow.rate * self._shares.captures,
            shadow_allow_on=shadow.allow_on,
            shadow_top_k=shadow.top_k,
            shadow_max_tokens=shadow.max_tokens,
            scoring=self._models.scores(now),
            tap=engines.tap,
            tap_tokens=engines.tap_tokens,
            prefer_plugin=self._shares.prefers_plugin(now),
            forced=profiles.serving.forced,
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
