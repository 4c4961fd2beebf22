"""The part that the adapters for both of vLLM's model runners share: binding requests to profiles, applying them,
tapping rows.

Rules:
- A request is bound once, when it is admitted, and keeps that profile until it ends: profiles that arrive, are evicted
  or are rolled back meanwhile do not change it. (Exception: after a preemption, model runner V2 with several worker
  processes admits the request again without its state; it is bound again, and its taps show the new profile.)
- Under tensor parallelism a profile is bound only when every rank has it: every rank samples, and all must sample the
  same token. The ranks agree by an all-reduce in the step that admits the request.
- A request whose parameters change the logits before the processor (see `xargs.edits_logits`) gets identity; counted.
  Of a tap of it nothing is measured, since the features would come from changed logits.
- Keys that make the plugin act (taps, forced tokens, the look at the KV cache) count only where they carry the MAC of a
  control process that this engine knows (`hemostat_calibration.engine_keys`); otherwise they are as if absent; counted.
- A row without a profile is unchanged, and a step without any profile or tap returns immediately.
- A profile that fails, whatever it raises, is off from then on in this engine, on all ranks in the same step: its rows
  stay as they are, its requests get identity, and it is not reported as held. Nothing of it ends vLLM.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed

from hemostat_engine import transform, xargs
from hemostat_engine.agent import Agent, Identity
from hemostat_engine.kv_precision import KvPrecision
from hemostat_engine.library import Counters, Library
from hemostat_engine.masks import UNKNOWN, GrammarMasks, Masks
from hemostat_engine.numbering import Numbering
from hemostat_engine.retries import first_line
from hemostat_engine.settings import Settings
from hemostat_engine.taps import Reading, SlotTap, Step, TappedRow, Taps
from hemostat_engine.transform import HeldProfile
from hemostat_engine.weights import LoadedWeights

log = logging.getLogger("hemostat.engine")

T = TypeVar("T")
MAX_TAPPED_CANDIDATES = 2
"""The largest number of held profiles that are evaluated for a tapped row in addition to the applied one."""

_BINDING_ATTRIBUTE = "_hemostat_binding"


@dataclass(frozen=True, slots=True)
class Binding:
    """The profile and the tap that one request is bound to.

    profile: None is identity. nonce: None: it is not tapped. child: the number of the tapped request among the ones
    with the same nonce, since vLLM makes n requests of one with n > 1. measured: the tap has numbers. forced: the first
    ids of its output; empty: none are forced.
    """

    profile: HeldProfile | None
    nonce: str | None
    child: int = 0
    measured: bool = True
    forced: tuple[int, ...] = ()

    @property
    def applied(self) -> str | None:
        return self.profile.version if self.profile and not self.profile.failed else None


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process within its tensor-parallel group: the processes that sample the same tokens."""

    rank: int = 0
    size: int = 1
    group: Any = None
    """A torch.distributed group of CPU tensors; None when size is 1."""
    sharded: bool = False
    """Every rank samples other requests of the batch, so that every rank taps; otherwise only rank 0 does."""

    @property
    def sampling(self) -> Ranks:
        """The ranks that sample the same rows."""
        return Ranks() if self.sharded else self

    def all_have(self, flags: list[bool]) -> list[bool]:
        """Returns for each flag whether it is set on every rank. Every rank must call it in the same step."""
        if self.size == 1 or not flags:
            return flags
        votes = torch.tensor(flags, dtype=torch.int32)
        torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MIN, group=self.group)
        return [bool(vote) for vote in votes.tolist()]

    def broadcast(self, text: str) -> str:
        """Returns rank 0's `text`, on every rank."""
        if self.size == 1:
            return text
        shared = [text]
        first = torch.distributed.get_global_rank(self.group, 0)
        torch.distributed.broadcast_object_list(shared, src=first, group=self.group)
        return shared[0]


class DeviceCounters:
    """Counters on the device with a copy on the host that lags a little: nothing waits for the device."""

    def __init__(self, device: torch.device, names: tuple[str, ...], counters: Counters) -> None:
        self.on_device = torch.zeros(len(names), dtype=torch.int64, device=device)
        # For a GPU the copy is in pinned memory, which the GPU writes to asynchronously.
        self._on_host = self.on_device if device.type == "cpu" else torch.zeros(len(names), dtype=torch.int64)
        if device.type == "cuda":
            self._on_host = self._on_host.pin_memory()
        for i, name in enumerate(names):
            counters.add_external(name, self._on_host[i].item)

    def copy(self) -> None:
        """Copies the counts to the host; it is called after something was added `on_device`."""
        if self._on_host is not self.on_device:
            self._on_host.copy_(self.on_device, non_blocking=True)


class Core:
    """One per rank. All methods run on the engine's thread; `agent` has a thread of its own."""

    def __init__(
        self,
        *,
        device: torch.device,
        identity: Identity,
        ranks: Ranks,
        settings: Settings,
        masks: GrammarMasks,
        weights: LoadedWeights | None = None,
        kv_layers: Callable[[], Iterable[Any]] = tuple,
    ) -> None:
        """identity: of this rank. Rank 0's boot id is used on all ranks. weights: reported by rank 0. kv_layers: vLLM's
        attention layers."""
        self.device = device
        self.counters = Counters()
        self.library = Library(identity.vocab_size, device)
        self.taps = Taps(self.counters)
        self.masks = masks
        self._device_counters = DeviceCounters(device, ("rows_masked", "rows_kl_clamped"), self.counters)
        self._vocab_size = identity.vocab_size
        self._after_penalties = identity.runner == "v2"
        self._ranks, self._sampling = ranks, ranks.sampling
        self._tap_failed = False
        self._kv_precision = KvPrecision(kv_layers)
        self._children = Numbering()
        self._tapping = settings.admin_url is not None and ranks.sampling.rank == 0
        identity = replace(identity, boot_id=ranks.broadcast(identity.boot_id))
        reported = weights if ranks.rank == 0 else None
        self.agent = Agent(identity, settings, self.library, self.counters, self.taps, weights=reported)
        self.agent.start()

    def bind(self, admitted: Sequence[Any]) -> list[Binding | None]:
        """Binds requests by their SamplingParams; returns their bindings, None for a request without profile and tap.

        A preempted request that is resumed has its binding as an attribute of its params and keeps it.
        """
        unbound = [i for i, params in enumerate(admitted) if self._bound(params) is None]
        acting = [i for i in unbound if xargs.asks_to_act(admitted[i])]
        # A secret reaches the ranks one after the other: what only some believe, none acts on.
        known = self._ranks.all_have([self.agent.secrets.signed(admitted[i].extra_args) for i in acting])
        signed = {i for i, is_known in zip(acting, known, strict=True) if is_known}
        self.counters.add("requests_refused", len(acting) - len(signed))
        parameters = [self._parameters(params, signed=i in signed) for i, params in enumerate(admitted)]
        named = [i for i in unbound if parameters[i].version is not None]
        result = [self.library.get(parameters[i].version or "") for i in named]
        on_all_ranks = self._ranks.all_have([profile is not None for profile in result])
        profiles = {i: profile for i, profile, all_have in zip(named, result, on_all_ranks, strict=True) if all_have}
        self.counters.add("requests_bound", len(profiles))
        self.counters.add("requests_unknown", len(named) - len(profiles))
        bindings: list[Binding | None] = []
        for i, params in enumerate(admitted):
            binding = self._bound(params)
            if binding is None and parameters[i] is not xargs.NO_PARAMETERS:
                nonce = parameters[i].nonce if self._tapping else None
                child = 0 if nonce is None else self._children.next(nonce)
                forced = (self._precision(),) if parameters[i].precision else parameters[i].forced
                if max(forced, default=0) >= self._vocab_size:
                    forced = ()  # an id that the vocabulary does not have would end the engine
                binding = Binding(profiles.get(i), nonce, child, not parameters[i].edited, forced)
                setattr(params, _BINDING_ATTRIBUTE, binding)
            bindings.append(binding if binding and (binding.profile or binding.nonce or binding.forced) else None)
        return bindings

    def _precision(self) -> int:
        """Returns what `KvPrecision` says on rank 0, on all ranks."""
        known = self._kv_precision.get(time.monotonic()) if self._sampling.rank == 0 else 0
        return int(self._sampling.broadcast(str(known)))

    def _bound(self, params: Any) -> Binding | None:
        return getattr(params, _BINDING_ATTRIBUTE, None)

    def _parameters(self, params: Any, *, signed: bool) -> xargs.RequestParameters:
        try:
            parsed = xargs.parse(params.extra_args, signed=signed)
        except ValueError:
            # Some vLLM versions do not call validate_params: invalid values must not stop the engine.
            self.counters.add("requests_refused")
            return xargs.NO_PARAMETERS
        if parsed is not xargs.NO_PARAMETERS and xargs.edits_logits(params, self._after_penalties):
            self.counters.add("requests_declined")
            return replace(parsed, version=None, edited=True)
        return parsed

    def fits(self, logits: torch.Tensor) -> bool:
        """Returns True if the logits have the vocabulary size of the profiles. If they do not, every request gets
        identity, and that is counted.
        """
        if logits.shape[-1] == self._vocab_size:
            return True
        if not self.counters.read().get("steps_misfit"):
            log.error("logits have %d columns, the vocabulary %d: identity", logits.shape[-1], self._vocab_size)
        self.counters.add("steps_misfit")
        return False

    def apply_rows(self, logits: torch.Tensor, rows: Sequence[tuple[int, Binding]]) -> None:
        """Applies the profiles in place. rows: (row, binding of its request), known on the host."""
        by_version: dict[str, tuple[HeldProfile, list[int]]] = {}
        for row, binding in rows:
            if binding.profile is not None:
                by_version.setdefault(binding.profile.version, (binding.profile, []))[1].append(row)
        for profile, chosen in by_version.values():
            if not profile.is_probe:
                transform.apply_to_rows(
                    profile,
                    logits,
                    None if len(chosen) == logits.shape[0] else chosen,
                    self._device_counters.on_device,
                    on_device=self.on_device,
                    run=functools.partial(self._run, profile),
                )
            self._applied(profile, len(chosen))

    def apply_where(
        self, logits: torch.Tensor, profile: HeldProfile, chosen: Callable[[], torch.Tensor], requests: int
    ) -> None:
        """Applies in place at the rows `chosen()` (bool [N], on the device), which belong to `requests` requests."""
        if not profile.is_probe:
            counts, run = self._device_counters.on_device, functools.partial(self._run, profile)
            transform.apply_where(profile, logits, chosen, counts, run=run)
        self._applied(profile, requests)

    def _applied(self, profile: HeldProfile, rows: int) -> None:
        if not profile.failed:
            self.counters.add("rows_applied", rows)
            self._device_counters.copy()

    def _run(self, profile: HeldProfile, compute: Callable[[], transform.Commit]) -> bool:
        """See `transform.Run`. A part is changed on all ranks or on none: every rank samples from these rows."""
        commit = self._attempt(profile, compute)
        (works,) = self._sampling.all_have([commit is not None])
        if commit is None or not works:
            self._switch_off(profile, "it failed on another rank")
            return False
        self._attempt(profile, commit)
        return True

    def _attempt(self, profile: HeldProfile, action: Callable[[], T]) -> T | None:
        """Returns what the action returns; None if it raises, or if the profile is off."""
        if profile.failed:
            return None
        try:
            return action()
        except Exception as error:  # noqa: BLE001 - whatever a profile does, vLLM goes on
            self._switch_off(profile, f"{type(error).__name__}: {error}")
            return None

    def _switch_off(self, profile: HeldProfile, reason: str) -> None:
        if profile.failed:
            return
        profile.failed = True
        self.library.fail(profile.version)
        self.counters.add("profiles_failed")
        self.agent.report_soon()
        log.error("profile %s is off in this engine: %s", profile.version, first_line(reason))

    def on_device(self, indices: Sequence[int]) -> torch.Tensor:
        """Returns the indices as int64 on the device; the copy does not wait for the device."""
        host = torch.tensor(indices, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        return host.to(self.device, non_blocking=True)

    def tap_rows(
        self, reading: Reading, rows: Sequence[tuple[int, Binding]], places: Sequence[tuple[int, int]]
    ) -> None:
        """Hands on what was read at `rows`, once profiles were applied. Rows and places are known on the host.

        places: the position of each row's token in the output, and the id at the position before (-1: not known).
        """
        allowed = self._allowed([row for row, _ in rows])
        tapped = [
            TappedRow(i, binding.nonce or "", binding.applied, position, binding.child, previous, mask)
            for i, ((_, binding), (position, previous), mask) in enumerate(
                zip(rows, places, allowed.index, strict=True)
            )
        ]
        self.taps.push(Step(reading, rows=tapped, masks=allowed.words))

    def tap_slots(self, reading: Reading, slots: Mapping[int, tuple[Binding, int]], rows: Sequence[int]) -> None:
        """Taps rows if only the device knows slots and positions. slots: binding and prompt length of each. rows: of
        the batch, of each slot."""
        allowed = self._allowed(rows)
        taps = {
            slot: SlotTap(binding.nonce or "", binding.applied, prompt_len, binding.child, mask)
            for (slot, (binding, prompt_len)), mask in zip(slots.items(), allowed.index, strict=True)
        }
        self.taps.push(Step(reading, slots=taps, masks=allowed.words))

    def _allowed(self, rows: Sequence[int]) -> Masks:
        result = self.masks.of(rows, self.taps.has_room)
        if unknown := result.index.count(UNKNOWN):
            self.counters.add("sets_unknown", unknown)
        return result

    def read(
        self, bindings: Sequence[Binding], logits: torch.Tensor, where: Callable[[], tuple[torch.Tensor, ...]]
    ) -> Reading | None:
        """Measures the unmodified logits of tapped requests; returns None, and counts that, if it fails. Of requests
        whose binding is not `measured`, which are read apart from others, only where they are.

        where: returns the rows (int64 [R], on the device); where only the device knows whose they are, then also their
        slots, their positions, and the ids that the model was fed (-1: not known).
        """
        try:
            return self._read(bindings, logits, *where())
        except Exception as error:  # noqa: BLE001 - a request goes on without its numbers
            self.counters.add("taps_dropped", len(bindings))
            if not self._tap_failed:
                log.error("taps cannot be read: %s: %s", type(error).__name__, first_line(str(error)))
            self._tap_failed = True
            return None

    def _read(
        self, bindings: Sequence[Binding], logits: torch.Tensor, rows: torch.Tensor, *where: torch.Tensor
    ) -> Reading:
        held = self.library.candidates() if bindings[0].measured else ()
        profiles, values, clamped = self._evaluate(self._evaluated(bindings, held), logits, rows)
        anchored = next((profile for profile in held if profile.anchors is not None), None)
        if anchored is None or not self.taps.has_room(2 * rows.shape[0] * anchored.anchor_count):
            if anchored is not None:
                self.counters.add("features_dropped", rows.shape[0])
            anchored, features = None, logits.new_empty((rows.shape[0], 0), dtype=torch.float16)
        else:
            features = transform.centred(logits, rows, anchored.parameters["anchors"]).half()
        (values, clamped, features, *places), copied = self._to_host(values, clamped, features, *where)
        return Reading(
            versions=tuple(profile.version for profile in profiles),
            values=values,
            clamped=clamped,
            anchors=anchored.anchors if anchored else None,
            features=features,
            places=(places[0], places[1], places[2]) if places else None,
            copied=copied,
        )

    def _evaluate(
        self, profiles: tuple[HeldProfile, ...], logits: torch.Tensor, rows: torch.Tensor
    ) -> tuple[tuple[HeldProfile, ...], torch.Tensor, torch.Tensor]:
        """Returns the profiles that could be evaluated, and `transform.evaluate` of them."""
        if not profiles:
            values = logits.new_empty((0, rows.shape[0]), dtype=torch.float32)
            return (), values, values.bool()
        try:
            return profiles, *transform.evaluate(profiles, logits, rows)
        except Exception:
            alone = {p: self._attempt(p, functools.partial(transform.evaluate, (p,), logits, rows)) for p in profiles}
            working = tuple(profile for profile, result in alone.items() if result is not None)
            if len(working) == len(profiles):
                raise  # none of them is to blame
            return self._evaluate(working, logits, rows)

    def _evaluated(self, bindings: Iterable[Binding], held: tuple[HeldProfile, ...]) -> tuple[HeldProfile, ...]:
        """Returns the profiles to evaluate for these tapped requests: those applied to them, and the candidates."""
        bound = (b.profile for b in bindings if b.profile is not None)
        profiles = {p.version: p for p in bound if not p.is_probe and not p.failed}
        room = len(profiles) + MAX_TAPPED_CANDIDATES
        for candidate in held:
            if len(profiles) < room and not candidate.is_probe:
                profiles.setdefault(candidate.version, candidate)
        return tuple(profiles.values())

    def _to_host(self, *tensors: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], Any]:
        """Returns copies on the host, and the CUDA event after which they are complete (None: at once). Does not
        wait."""
        if self.device.type != "cuda":
            return tuple(t.to("cpu", copy=True) for t in tensors), None
        copies = []
        for tensor in tensors:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            copies.append(host.copy_(tensor, non_blocking=True))
        event = torch.cuda.Event()
        event.record()
        return tuple(copies), event
