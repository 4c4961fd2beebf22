"""The life of profiles: records in, decisions and what is written out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from tests.characterization.worlds import Truth, V, World, entropy, top
from tests.support.evidence import evidence
from tests.support.stores import DirectWrites

from hemostat.config.schema import Calibration, Evidence
from hemostat.profiles.decisions import DECISIONS, MAX_EVENTS, Reason
from hemostat.profiles.manager import ProfileManager
from hemostat.profiles.persistence import STATE_KEYS
from hemostat.store.protocol import StoredProfile
from hemostat_calibration.errors import HemostatError
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.record_checks import validate
from hemostat_calibration.records import Candidates, Shift, TokenRecord

from .profiles import (
    CLAMP,
    HELD_OUT,
    MODEL,
    TOKENS,
    TOP_K,
    effect,
    sha256,
)


def written(method: str, *args: Any) -> dict[str, Any]:
    """One write of the store in its golden form; the one place that knows how the product hands writes over."""
    match method, args:
        case "put_profile", [StoredProfile() as profile]:
            result = {"write": method, "version": profile.version, "created": profile.created}
            return result | {"sha256": sha256(profile.data)}
        case "delete_profile", [version]:
            return {"write": method, "version": version}
        case "append_event", [event]:
            return {"write": method, "event": event}
        case "set_state", [key, value]:
            return {"write": method, "key": key, "value": stored_state(key, value)}
    raise AssertionError(f"a write that this adapter does not know: {method}{args}")


def stored_state(key: str, value: Any) -> Any:
    """A state of the store; those of tests and kinds, which are long, as their most important parts."""
    if key == "tests":
        tests = json.loads(value)["state"]
        return {name: {kind: test["units"] for kind, test in kinds.items()} for name, kinds in tests["tests"].items()}
    if key == "kinds":
        result = json.loads(value)["state"]
        return {
            "serving": {name: [kind["version"], kind["window"]] for name, kind in result["kinds"].items()},
            "queue": result["queue"],
        }
    return value


OF_ADAPTERS = frozenset({Reason.PROBE, Reason.SLOT})


def every_decision() -> list[tuple[str, str]]:
    """Each decision about a profile with its reason; those about adapters alone have tests of their own."""
    return [(decision, reason) for decision, reason in DECISIONS if reason not in OF_ADAPTERS]


class _NotingWrites:
    """`StoreWrites` of a `Life`."""

    def __init__(self, life: Life) -> None:
        self._life = life

    def put_profile(self, profile: StoredProfile) -> None:
        self._life.save("put_profile", profile)

    def delete_profile(self, version: str) -> None:
        self._life.save("delete_profile", version)

    def append_event(self, event: dict[str, Any]) -> None:
        self._life.save("append_event", event)

    def set_state(self, key: str, value: str | None) -> None:
        self._life.save("set_state", key, value)

    def put_blob(self, key: str, data: bytes) -> None:
        raise AssertionError("profiles keep no blobs")

    def queued(self) -> int:
        return 0

    def has_written(self, write: int) -> bool:
        return True


class Life:
    """A `ProfileManager` whose writes go to a store at once and to `saves`, and which is fed whole records.

    store: the one of another `Life`, for a restart.
    """

    def __init__(
        self,
        store: Any = None,
        *,
        known: bool = True,
        at: float = 0.0,
        **calibration: Any,
    ) -> None:
        self.store: Any = store or DirectWrites()
        self.now = at
        self.saves: list[dict[str, Any]] = []
        given = {"mode": "auto", "min_tokens": 300, "clamp_nats": CLAMP, "held_out_fraction": HELD_OUT} | calibration
        self._profiles = ProfileManager(
            Calibration.model_validate(given),
            _NotingWrites(self),
            lambda: self.now,
            evidence=Evidence(cycle_hours=0.0),
        )
        if known:
            self.know()

    def save(self, method: str, *args: Any) -> None:
        self.saves.append(written(method, *args))
        getattr(self.store, method)(*args)

    def know(self, model: str = MODEL, vocabulary: int = V) -> None:
        self._profiles.set_model_pair(model, vocabulary)

    def restore(self) -> None:
        """What a new process does with the store of an earlier one."""
        self._profiles.restoring.restore(*self._stored())

    def _stored(self) -> tuple[list[StoredProfile], dict[str, str | None], list[dict[str, Any]]]:
        states = {name: self.store.get_state(name) for name in STATE_KEYS}
        return self.store.profiles(), states, self.store.events(MAX_EVENTS)

    def damage(self, version: str) -> None:
        """Put bytes into the store that are no profile."""
        self.store.put_profile(StoredProfile(version, b"junk", self.now))

    def feed(
        self,
        world: World,
        prompts: Iterable[bytes],
        until: Callable[[], bool] = lambda: False,
        *,
        exact: bool = True,
        **more: Any,
    ) -> int:
        """One record a prompt, a second apart, until `until` is true; returns how many.

        exact: the reference and the engine say what each profile in question does.
        """
        fed = 0
        for n, key in enumerate(prompts):
            if until():
                break
            self.now += 1.0
            record = self._record(world.truth(n, TOKENS), key, exact, more)
            record = replace(record, kind=self._profiles.kinds.update(record.kind))
            self._profiles.update(evidence(record))
            fed += 1
        return fed

    def _record(self, truth: Truth, key: bytes, exact: bool, more: dict[str, Any]) -> TokenRecord:
        rows = np.arange(len(truth.emitted))
        ids, values = top(truth.compressed, TOP_K, truth.emitted)
        at = np.take_along_axis(truth.reference, np.maximum(ids, 0), -1)
        shifts = {p.version: Shift(*effect(p, truth)) for p in self._profiles.evaluated_profiles()} if exact else {}
        return validate(
            TokenRecord(
                vocab_size=V,
                prompt_key=key,
                output_ids=truth.emitted.astype(np.int32),
                compressed=Candidates(ids, values),
                reference_at=np.where(ids >= 0, at, np.nan),
                reference=Candidates(*top(truth.reference, 8)),
                compressed_emitted=truth.compressed[rows, truth.emitted],
                reference_emitted=truth.reference[rows, truth.emitted],
                reference_entropy=entropy(truth.reference),
                shifts=shifts,
                **more,
            )
        )

    # What the operator and the learner do; the answer of the product, or its refusal.

    def import_profile(self, profile: CalibrationProfile) -> str:
        return self._asked(lambda: self._profiles.operator.import_profile(profile))

    def promote(self, version: str, kind: str | None = None) -> str:
        return self._asked(lambda: self._profiles.operator.promote(version, kind))

    def pin(self, version: str) -> str:
        return self._asked(lambda: self._profiles.operator.pin(version))

    def unpin(self) -> str:
        return self._asked(self._profiles.operator.unpin)

    def roll_back(self, kind: str | None = None) -> str:
        return self._asked(lambda: self._profiles.operator.roll_back("asked for by the operator", kind))

    def harm(self, kind: str) -> None:
        """An outcome of the treated requests of this kind is proven to be worse."""
        self._profiles.lifecycle.roll_back(kind, Reason.OUTCOMES, "valid JSON fell by more than the margin", {})

    def release(self, kind: str | None = None) -> str:
        return self._asked(lambda: self._profiles.operator.release(kind))

    def end(self) -> None:
        """The process ends, and writes what it knows."""
        self._profiles.writer.save()

    def set_mode(self, mode: str) -> str:
        return self._asked(lambda: self._profiles.operator.set_mode(mode))

    def probe(self, profile: CalibrationProfile) -> str:
        return self._asked(lambda: self._profiles.proposals.set_probe(profile))

    def propose(self, profile: CalibrationProfile, tokens: int) -> str:
        """Proposes a profile, as the learner of its family does."""
        why, report = f"learned from {tokens} tokens", {"tokens": tokens, "won_back": 0.25}
        return self._asked(lambda: self._profiles.proposals.propose(profile, why, report))

    def _asked(self, act: Callable[[], object]) -> str:
        try:
            answer = act()
        except HemostatError as error:
            return f"refused: {error}"
        return "done" if answer is None else str(answer)

    @property
    def selected(self) -> str | None:
        return self._profiles.serving.selected

    @property
    def by_kind(self) -> dict[str, str]:
        return dict(self._profiles.serving.version_by_kind)

    @property
    def candidates(self) -> list[str]:
        return list(self._profiles.trials.tested_versions)

    @property
    def window(self) -> int:
        """Of what serves all: the held-out requests in which it is watched."""
        return int(self._profiles.report.status()["selected"]["window"])

    def state(self) -> dict[str, Any]:
        """What relays, engines and the console are told."""
        manager, told = self._profiles, self._profiles.report.status()
        candidates = [f"{c['version']} {c['source']} {c['requests']}" for c in told["candidates"]]
        evaluated = [profile.version for profile in manager.evaluated_profiles()]
        result = {
            "mode": told["mode"],
            "pinned": told["pinned"],
            "serving": manager.serving.version,
            "shown": manager.serving.reported,
            "by_kind": manager.serving.version_by_kind,
            "wanted": manager.engine_versions(),
            "evaluated": "as wanted" if evaluated == manager.engine_versions() else evaluated,
            "candidates": candidates,
            "waiting": [f"{c['version']} {c['source']}" for c in told["waiting"]],
            "tests_begun": told["tests_begun"],
            "promotions": sum(n for (decision, _), n in manager.events.counts.items() if decision == "promote"),
            "rollbacks": sum(n for (decision, _), n in manager.events.counts.items() if decision == "roll_back"),
        }
        return {name: value for name, value in result.items() if value not in (None, [], {}, False, 0)}

    def decisions(self) -> dict[str, int]:
        """Counted by decision and reason, those that happened."""
        return {" ".join(pair): count for pair, count in sorted(self._profiles.events.counts.items()) if count}

    def status(self) -> dict[str, Any]:
        return self._profiles.report.status()

    def listing(self) -> dict[str, Any]:
        return self._profiles.report.listing()
