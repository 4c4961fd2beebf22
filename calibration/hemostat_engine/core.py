"""What both of vLLM's model runners share: who is bound to what, and what is done to their rows.

Rules:
- A request is bound once, when it is admitted. It keeps that very profile to its end: nothing that arrives, leaves or
  is rolled back meanwhile changes a sequence in the middle. (One exception: after a preemption, model runner V2 with
  several worker processes admits the request anew and forgets what it was; it is bound again, and its taps say so.)
- Under tensor parallelism a profile is bound only when every rank has it: the ranks ask each other in the step that
  admits the request, because they sample each for itself and must not diverge.
- A request that edits, ahead of the processor, the logits that features are read from gets identity, counted.
- A row without a profile is not touched, and a step in which no row has one or is tapped returns at once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed

from hemostat_engine import transform, xargs
from hemostat_engine.agent import Agent, Identity
from hemostat_engine.library import Counters, Library
from hemostat_engine.settings import Settings
from hemostat_engine.taps import Reading, SlotTap, Step, TappedRow, Taps
from hemostat_engine.transform import HeldProfile

log = logging.getLogger("hemostat.engine")

CANDIDATES_TAPPED = 2
"""Held profiles whose log-normalizer is handed out beside that of the applied one."""

_BOUND = "_hemostat_binding"


@dataclass(frozen=True, slots=True)
class Binding:
    """What one request was admitted with; `profile` None is identity, `nonce` None is not tapped."""

    profile: HeldProfile | None
    nonce: str | None

    @property
    def applied(self) -> str | None:
        return self.profile.version if self.profile else None


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that sample the same tokens."""

    rank: int = 0
    size: int = 1
    group: Any = None
    """A torch.distributed group of CPU tensors; None when size is 1."""

    def all_have(self, flags: list[bool]) -> list[bool]:
        """Flag by flag, whether it is set on every rank. Every rank calls it in the same step with as many flags."""
        if self.size == 1 or not flags:
            return flags
        votes = torch.tensor(flags, dtype=torch.int32)
        torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MIN, group=self.group)
        return [bool(vote) for vote in votes.tolist()]

    def same(self, text: str) -> str:
        """Rank 0's `text`, on every rank."""
        if self.size == 1:
            return text
        shared = [text]
        first = torch.distributed.get_global_rank(self.group, 0)
        torch.distributed.broadcast_object_list(shared, src=first, group=self.group)
        return shared[0]


class Tally:
    """What was counted on the device, on the host a little later: nothing waits for it."""

    def __init__(self, device: torch.device, names: tuple[str, ...], counters: Counters) -> None:
        self._on_device = torch.zeros(len(names), dtype=torch.int64, device=device)
        # On a GPU the host has a copy of its own, in memory that the GPU can write to while nobody waits.
        self._on_host = self._on_device if device.type == "cpu" else torch.zeros(len(names), dtype=torch.int64)
        if device.type == "cuda":
            self._on_host = self._on_host.pin_memory()
        for i, name in enumerate(names):
            counters.counted_by(name, self._on_host[i].item)

    def add(self, counts: torch.Tensor) -> None:
        """counts: int64 [names], on the device."""
        self._on_device.add_(counts)
        if self._on_host is not self._on_device:
            self._on_host.copy_(self._on_device, non_blocking=True)


class Core:
    """One per rank. All methods but the agent's run on the engine's own thread."""

    def __init__(
        self,
        *,
        device: torch.device,
        vocab_size: int,
        runner: str,
        vllm_version: str,
        boot_id: str,
        ranks: Ranks,
        settings: Settings,
        taps_everywhere: bool = False,
    ) -> None:
        """taps_everywhere: every rank samples requests of its own, so every rank taps; else rank 0 does."""
        self.device = device
        self.counters = Counters()
        self.library = Library(vocab_size)
        self.taps = Taps(self.counters)
        self._tally = Tally(device, ("rows_masked", "rows_kl_clamped"), self.counters)
        self._vocab_size = vocab_size
        self._after_penalties = runner == "v2"
        self._ranks = ranks
        self._tapping = settings.admin_url is not None and (ranks.rank == 0 or taps_everywhere)
        identity = Identity(ranks.same(boot_id), ranks.rank, ranks.size, vocab_size, runner, vllm_version)
        self.agent = Agent(identity, settings, self.library, self.counters, self.taps)
        self.agent.start()

    def bind(self, admitted: Sequence[Any]) -> list[Binding | None]:
        """Bind requests by their SamplingParams; None for one that asks for nothing.

        A request that vLLM had set aside and takes up again carries its binding on its params and keeps it.
        """
        asked = [self._asked(params) for params in admitted]
        naming = [i for i, a in enumerate(asked) if a.version is not None and self._bound(admitted[i]) is None]
        found = [self.library.get(asked[i].version or "") for i in naming]
        agreed = self._ranks.all_have([profile is not None for profile in found])
        profiles = {i: profile for i, profile, all_have in zip(naming, found, agreed, strict=True) if all_have}
        self.counters.add("requests_bound", len(profiles))
        self.counters.add("requests_unknown", len(naming) - len(profiles))
        bindings: list[Binding | None] = []
        for i, params in enumerate(admitted):
            binding = self._bound(params)
            if binding is None and (i in profiles or asked[i].nonce is not None or asked[i].version is not None):
                binding = Binding(profiles.get(i), asked[i].nonce if self._tapping else None)
                setattr(params, _BOUND, binding)
            bindings.append(binding if binding and (binding.profile or binding.nonce) else None)
        return bindings

    def _bound(self, params: Any) -> Binding | None:
        return getattr(params, _BOUND, None)

    def _asked(self, params: Any) -> xargs.Asked:
        try:
            asked = xargs.parse(params.extra_args)
        except ValueError:
            # Only a vLLM that does not call validate_params lets one through; here it must not stop the engine.
            self.counters.add("requests_refused")
            return xargs.NOTHING
        if asked is not xargs.NOTHING and xargs.edits_logits(params, self._after_penalties):
            self.counters.add("requests_declined")
            return xargs.NOTHING
        return asked

    def fits(self, logits: torch.Tensor) -> bool:
        """Whether these logits have the vocabulary that the profiles were checked against; else identity, counted."""
        if logits.shape[-1] == self._vocab_size:
            return True
        if not self.counters.read().get("steps_misfit"):
            log.error("logits have %d columns, the vocabulary %d: identity", logits.shape[-1], self._vocab_size)
        self.counters.add("steps_misfit")
        return False

    def apply_rows(self, logits: torch.Tensor, rows: Sequence[tuple[int, Binding]]) -> None:
        """Apply in place where the host knows the rows: (row, its request's binding)."""
        by_version: dict[str, tuple[HeldProfile, list[int]]] = {}
        for row, binding in rows:
            if binding.profile is not None:
                by_version.setdefault(binding.profile.version, (binding.profile, []))[1].append(row)
        for profile, chosen in by_version.values():
            self.counters.add("rows_applied", len(chosen))
            if not profile.idle:
                every = len(chosen) == logits.shape[0]
                self._tally.add(transform.apply_to_rows(profile, logits, None if every else self.on_device(chosen)))

    def apply_where(self, logits: torch.Tensor, profile: HeldProfile, chosen: torch.Tensor, requests: int) -> None:
        """Apply in place at the rows `chosen` (bool [N], on the device) of so many requests."""
        self.counters.add("rows_applied", requests)
        if not profile.idle:
            self._tally.add(transform.apply_where(profile, logits, chosen))

    def on_device(self, indices: Sequence[int]) -> torch.Tensor:
        """int64 on the device; the copy does not wait for the device."""
        host = torch.tensor(indices, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        return host.to(self.device, non_blocking=True)

    def tap_rows(self, logits: torch.Tensor, rows: Sequence[tuple[int, Binding]], positions: Sequence[int]) -> None:
        """Take what the unmodified logits say at `rows`, where the host knows rows and positions."""
        tapped = [
            TappedRow(i, binding.nonce or "", binding.applied, position)
            for i, ((_, binding), position) in enumerate(zip(rows, positions, strict=True))
        ]
        reading = self._read((binding for _, binding in rows), logits, self.on_device([row for row, _ in rows]))
        self.taps.push(Step(reading, rows=tapped))

    def tap_slots(
        self,
        logits: torch.Tensor,
        slots: Mapping[int, tuple[Binding, int]],
        rows: torch.Tensor,
        slot_of_row: torch.Tensor,
        pos: torch.Tensor,
    ) -> None:
        """The same for `rows` (int64, on the device) whose slots and positions only the device knows.

        slots: the tapped ones' bindings, and the lengths of their prompts.
        """
        bindings = (binding for binding, _ in slots.values())
        reading = self._read(bindings, logits, rows, slot_of_row, pos)
        taps = {slot: SlotTap(b.nonce or "", b.applied, prompt_len) for slot, (b, prompt_len) in slots.items()}
        self.taps.push(Step(reading, slots=taps))

    def _read(
        self, bindings: Iterable[Binding], logits: torch.Tensor, rows: torch.Tensor, *where: torch.Tensor
    ) -> Reading:
        """What is handed out of these rows; `where`: slots and positions, when only the device knows them."""
        held = self.library.candidates()
        profiles = self._evaluated(bindings, held)
        if profiles:
            values, clamped = transform.evaluate(profiles, logits, rows)
        else:
            values = logits.new_empty((0, rows.shape[0]), dtype=torch.float32)
            clamped = values.bool()
        anchored = next((profile for profile in held if profile.anchors is not None), None)
        if anchored is None or not self.taps.has_room(2 * rows.shape[0] * anchored.anchor_count):
            if anchored is not None:
                self.counters.add("features_dropped", rows.shape[0])
            anchored, features = None, logits.new_empty((rows.shape[0], 0), dtype=torch.float16)
        else:
            features = transform.centred(logits, rows, anchored.on(logits.device)["anchors"]).half()
        (values, clamped, features, *places), copied = self._to_host(values, clamped, features, *where)
        return Reading(
            versions=tuple(profile.version for profile in profiles),
            values=values,
            clamped=clamped,
            anchors=anchored.anchors if anchored else None,
            features=features,
            places=(places[0], places[1]) if places else None,
            copied=copied,
        )

    def _evaluated(self, bindings: Iterable[Binding], held: tuple[HeldProfile, ...]) -> tuple[HeldProfile, ...]:
        """What is evaluated for these tapped requests: what is applied to them, and the candidates."""
        profiles = {b.profile.version: b.profile for b in bindings if b.profile is not None and not b.profile.idle}
        room = len(profiles) + CANDIDATES_TAPPED
        for candidate in held:
            if len(profiles) < room and not candidate.idle:
                profiles.setdefault(candidate.version, candidate)
        return tuple(profiles.values())

    def _to_host(self, *tensors: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], Any]:
        """Copies on the host, and the event after which they are complete (None: they are). None is waited for."""
        if self.device.type != "cuda":
            return tuple(t.to("cpu", copy=True) for t in tensors), None
        copies = []
        for tensor in tensors:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            copies.append(host.copy_(tensor, non_blocking=True))
        event = torch.cuda.Event()
        event.record()
        return tuple(copies), event
