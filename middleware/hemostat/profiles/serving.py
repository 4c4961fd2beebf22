"""What serves: the mode, the pair of models, a forced or pinned profile, and from them the version for a request.

Invariants:
- A version serves only in mode `auto`, only after it was promoted (by the guard or the operator), and only once both
  models are known, so that a profile kept from an earlier run is not applied to another model.
- In `observe` everything happens as in `auto` except serving: `selected` is what would serve.
- A forced profile (`calibration.force`, for tests) goes on every request; nothing is learned or judged meanwhile.
- A pinned profile serves all requests, also those of scopes with a profile of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

from hemostat.profiles.scopes import ALL, MAX_SCOPE_PROFILES, Scopes
from hemostat_calibration.errors import InvalidProfileError
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.records import TokenRecord


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The compressed model, once it is known that the reference uses the same token ids.

    name: its served name.
    """

    name: str
    vocab_size: int


class ServingState:
    """mode: off, observe or auto."""

    def __init__(self, scopes: Scopes, mode: str) -> None:
        self.scopes = scopes
        self.mode = mode
        self.model: ServedModel | None = None
        """None until both models are known."""
        self.forced: str | None = None
        self.pinned = False
        """The pooled profile is the operator's choice; it is neither replaced nor rolled back automatically."""

    @property
    def selected(self) -> str | None:
        """What serves, or in `observe` would serve, requests whose scope has no profile of its own."""
        return self.scopes[ALL].selected

    @property
    def version(self) -> str | None:
        """The version that treated requests ask for; None for identity."""
        return self.selected if self._serves else None

    @property
    def version_by_scope(self) -> dict[str, str]:
        """The same for scopes that have a profile of their own."""
        return self.scope_profiles() if self._serves else {}

    @property
    def reported(self) -> str | None:
        """The version that report, metrics and console are about: what serves, or would."""
        return (self.forced or self.selected) if self.mode != "off" else None

    @property
    def _serves(self) -> bool:
        return self.model is not None and self.mode == "auto" and self.forced is None

    @property
    def active(self) -> bool:
        """Profiles are learned and judged."""
        return self.model is not None and self.mode != "off" and self.forced is None

    def uses(self, record: TokenRecord) -> bool:
        """Whether the record may be learned from or judged by."""
        return self.active and self.model is not None and record.vocab_size == self.model.vocab_size

    def scope_profiles(self) -> dict[str, str]:
        """Version by scope that has one of its own; none while a profile is pinned or forced on all."""
        return {} if self.pinned or self.forced is not None else self.scopes.own_profiles()

    def serving_scope(self, scope: str) -> str:
        """The scope whose profile serves the requests of `scope`: itself, or `ALL`."""
        return scope if scope in self.scope_profiles() else ALL

    def baseline(self, scope: str) -> str | None:
        """The version that a candidate for `scope` has to be better than; None for identity."""
        return self.scopes[self.serving_scope(scope)].selected

    def would_serve(self, record: TokenRecord) -> str | None:
        """The version for a request like this one, in `observe` also."""
        scope = self.serving_scope(self.scopes.of(record))
        return self.reported if scope == ALL or self.mode == "off" else self.scopes[scope].selected

    def has_room(self, scope: str) -> bool:
        """Whether the scope may get a profile of its own, or has one."""
        own = self.scope_profiles()
        return scope == ALL or scope in own or len(own) < MAX_SCOPE_PROFILES

    def require_model(self, profile: CalibrationProfile) -> None:
        """InvalidProfileError where the profile is for another model; nothing while the model is not known."""
        if self.model is None:
            return
        if profile.vocab_size != self.model.vocab_size:
            raise InvalidProfileError(
                f"profile is for a vocabulary of {profile.vocab_size} ids, the model has {self.model.vocab_size}"
            )
        if profile.model not in {"", self.model.name}:
            raise InvalidProfileError(f"profile is for the model {profile.model}, not for {self.model.name}")
