"""The state of what serves: the mode, the pair of models, and for each kind of traffic the version that serves it.

Invariants:
- A version serves a kind only in mode `auto`, only after it was promoted in that kind (by the guard or the operator),
  and only once both models are known, so that a profile kept from an earlier run is not applied to another model.
- In `observe` everything happens as in `auto` except serving: a kind's `version` is what would serve it.
- At most `MAX_SERVING_VERSIONS` different profiles serve at a time: engines hold a limited number. Of adapters, no
  further one comes to serve above `max_adapters`: each takes a slot of the engine. What serves already keeps its place,
  until engines are known to have fewer slots (`lifecycle.Lifecycle.limit_adapters`).
- A kind that is held (an outcome was harmed) stays at identity until an operator releases it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from hemostat.ipc.messages import REST_KIND, rest_of
from hemostat_calibration.errors import HemostatError, InvalidProfileError
from hemostat_calibration.guard.guard import DEFAULT_WINDOW
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.records import TokenRecord

MAX_SERVING_VERSIONS = 4
"""The largest number of different profiles that serve at a time. With two candidates and the probe these are fewer than
an engine holds."""
MAX_TRIED_VERSIONS = 16
"""The largest number of versions that a kind remembers as tested; the oldest is forgotten."""
MAX_FORMER_KINDS = 256
"""The largest number of kinds that lost their place, of which it is remembered what was rolled back there; the oldest
is forgotten first."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The compressed model, once it is known that the reference uses the same token ids.

    name: its served name.
    """

    name: str
    vocab_size: int


@dataclass(slots=True)
class KindState:
    """The state of what serves the requests of one kind."""

    version: str | None = None
    """The version that serves; None: identity."""
    window: int = DEFAULT_WINDOW
    """The length of the windows in which `version` is watched, in units."""
    chosen: bool = False
    """It is True if `version` was promoted by an operator, not on evidence."""
    pinned: bool = False
    """It is True if `version` is neither replaced nor rolled back automatically."""
    held: str = ""
    """The reason why identity has to serve until an operator releases the kind; "" if it need not."""
    units: int = 0
    """The number of held-out units of this kind so far; no test begins before the first."""
    tried: list[str] = field(default_factory=list)
    """The versions that are not tested here again by themselves: rolled back, replaced or given up."""

    def update_tried(self, version: str) -> None:
        self.tried = [*(other for other in self.tried if other != version), version][-MAX_TRIED_VERSIONS:]


class ServingState:
    """The state of what serves.

    mode: off, observe or auto. changes_weights: (version that is held) -> True if it is an adapter.
    """

    def __init__(
        self,
        mode: str,
        changes_weights: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self.mode = mode
        self.rolled_back = False
        """It is True if the last profile was rolled back in some kind, and none has been promoted since."""
        self.changes_weights = changes_weights
        self.max_adapters: float | None = math.inf
        """The number of different adapters that may serve at a time: as many as engines have slots for. While it is
        None, it is not known, and no further adapter may. In `observe` nothing is loaded, and it limits nothing.
        """
        self.model: ServedModel | None = None
        """The compressed model that profiles are for; None until both models are known."""
        self.names: frozenset[str] | None = None
        """The served names of this model and of its adapters: only records of these are used. While it is None, they
        are not known, and all records are used.
        """
        self.kinds: dict[str, KindState] = {REST_KIND: KindState()}
        """The state of every kind that is followed, and of `REST_KIND`."""
        self.former: dict[str, KindState] = {}
        """The parts of a state that are remembered for kinds that may come back: `tried` and `held`."""

    def forget_kind(self, kind: str) -> None:
        """Removes a kind that loses its place. What was tried there is remembered."""
        state = self.kinds.pop(kind)
        self.former.pop(kind, None)
        if state.tried or state.held:
            self.former[kind] = KindState(tried=state.tried, held=state.held)
        while len(self.former) > MAX_FORMER_KINDS:
            del self.former[next(iter(self.former))]

    def named(self, name: str | None) -> list[str]:
        """Returns the kinds that an operator means: the one that is named, or with None all. Raises HemostatError."""
        if name is None:
            return list(self.kinds)
        if name not in self.kinds:
            followed = "; ".join(sorted(self.kinds))
            raise HemostatError(f"no kind {name[:80]!r} is followed; followed are: {followed}")
        return [name]

    # --- what serves -----------------------------------------------------------------------------------------------

    @property
    def version_by_kind(self) -> dict[str, str]:
        """The versions that treated requests ask for; kinds that identity serves are absent."""
        return self.selected_by_kind if self._serves else {}

    @property
    def selected_by_kind(self) -> dict[str, str]:
        """The version that serves each kind, or in `observe` would serve it."""
        return {kind: state.version for kind, state in self.kinds.items() if state.version is not None}

    @property
    def versions(self) -> list[str]:
        """The different versions that serve, or would; the one with the most held-out units first."""
        units: dict[str, int] = {}
        for state in self.kinds.values():
            if state.version is not None:
                units[state.version] = units.get(state.version, 0) + state.units
        return sorted(units, key=lambda version: -units[version])

    @property
    def selected(self) -> str | None:
        """The version that serves, or would serve, the largest part of the traffic that any profile serves."""
        return next(iter(self.versions), None)

    @property
    def version(self) -> str | None:
        """The same, where it serves."""
        return self.selected if self._serves else None

    @property
    def reported(self) -> str | None:
        """The version that the figures over all kinds are about: what serves, or would."""
        return self.selected if self.mode != "off" else None

    @property
    def pinned(self) -> bool:
        """It is True if a version is pinned in any kind."""
        return any(state.pinned for state in self.kinds.values())

    @property
    def held(self) -> set[str]:
        return {kind for kind, state in self.kinds.items() if state.held}

    @property
    def fixed(self) -> set[str]:
        """The kinds in which an operator's decision, or the lack of one, is in force: held or pinned."""
        return {kind for kind, state in self.kinds.items() if state.held or state.pinned}

    @property
    def _serves(self) -> bool:
        return self.model is not None and self.mode == "auto"

    @property
    def active(self) -> bool:
        """It is True if profiles are learned and judged."""
        return self.model is not None and self.mode != "off"

    def would_serve(self, record: TokenRecord) -> str | None:
        """Returns the version for a request like this one, in `observe` also."""
        if self.mode == "off":
            return None
        return self.state_of(record).version

    def state_of(self, record: TokenRecord) -> KindState:
        """Returns the state of the record's kind, or of the rest; nothing serves the rest of what a grammar
        restricts.
        """
        return self.kinds.get(record.kind) or self.kinds.get(rest_of(record.kind)) or KindState()

    def has_room(self, version: str, kinds: Collection[str]) -> bool:
        """Returns True if the version may serve these kinds, without too many different ones serving then."""
        return self.why_no_room(version, kinds) is None

    def _versions_beside(self, version: str, kinds: Collection[str]) -> set[str | None]:
        return {state.version for name, state in self.kinds.items() if name not in kinds} - {None, version}

    def why_no_place(self, version: str, kinds: Collection[str]) -> str | None:
        """Returns why the version may not serve these kinds, as far as that does not depend on engines; None if it may.
        See `why_no_room`.
        """
        if len(self._versions_beside(version, kinds)) < MAX_SERVING_VERSIONS:
            return None
        return f"{MAX_SERVING_VERSIONS} other profiles serve, as many as may at a time"

    def why_no_room(self, version: str, kinds: Collection[str]) -> str | None:
        """Returns in words why the version may not serve these kinds; None if there is room."""
        others = self._versions_beside(version, kinds)
        if (full := self.why_no_place(version, kinds)) is not None:
            return full
        if self.mode != "auto" or not self.changes_weights(version):
            return None
        if self.max_adapters is None:
            return "it is not known yet how many adapters the engines have slots for"
        if not self.max_adapters:
            return "no engine can load an adapter now"
        adapters = sum(other is not None and self.changes_weights(other) for other in others)
        if adapters < self.max_adapters:
            return None
        return f"{adapters} other adapters serve, as many as engines have slots for"

    def slot_for(self, version: str, proven: Collection[str]) -> set[str] | None:
        """Returns the kinds served by the adapter whose slot another one may take that is proven better in `proven`:
        more than half of its held-out units are of these. None if there is no such adapter, or an operator chose
        it."""
        if not self.changes_weights(version) or not self.max_adapters:
            return None
        others = {other for other in self.versions if other != version and self.changes_weights(other)}
        if len(others) != self.max_adapters:
            return None
        for other in sorted(others, key=self.versions.index, reverse=True):
            kinds = {kind: state for kind, state in self.kinds.items() if state.version == other}
            better = sum(state.units for kind, state in kinds.items() if kind in proven)
            chosen = any(state.chosen or state.pinned for state in kinds.values())
            room = len({*self.versions, version} - {other}) <= MAX_SERVING_VERSIONS
            if room and not chosen and 2 * better > sum(state.units for state in kinds.values()):
                return set(kinds)
        return None

    # --- the model -------------------------------------------------------------------------------------------------

    def uses(self, record: TokenRecord) -> bool:
        """Returns True if the record may be learned from or judged by; not if it belongs to another base model."""
        if not self.active or self.model is None or record.vocab_size != self.model.vocab_size:
            return False
        return self.names is None or record.model in self.names

    def require_model(self, profile: CalibrationProfile) -> None:
        """Raises InvalidProfileError if the profile is for another model; nothing while the model is not known."""
        if self.model is None:
            return
        if profile.vocab_size != self.model.vocab_size:
            raise InvalidProfileError(
                f"profile is for a vocabulary of {profile.vocab_size} ids, the model has {self.model.vocab_size}"
            )
        if profile.model not in {"", self.model.name}:
            raise InvalidProfileError(f"profile is for the model {profile.model}, not for {self.model.name}")
