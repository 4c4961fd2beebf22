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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed

from hemostat_calibration.engine import transform, xargs
from hemostat_calibration.engine.agent import Agent, Identity, Settings
from hemostat_calibration.engine.library import Counters, Library
from hemostat_calibration.engine.taps import SlotTap, Step, TappedRow, Taps
from hemostat_calibration.engine.transform import HeldProfile

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
            transform.apply_to_rows(profile, logits, self.on_device(chosen))
            self.counters.add("rows_applied", len(chosen))

    def on_device(self, indices: Sequence[int]) -> torch.Tensor:
        """int64 on the device; the copy does not wait for the device."""
        host = torch.tensor(indices, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        return host.to(self.device, non_blocking=True)

    def tapped_profiles(self, bindings: Iterable[Binding]) -> tuple[HeldProfile, ...]:
        """What is evaluated for these tapped requests: what is applied to them, and the candidates."""
        profiles = {b.profile.version: b.profile for b in bindings if b.profile is not None}
        room = len(profiles) + CANDIDATES_TAPPED
        for candidate in self.library.candidates(room):
            if len(profiles) < room:
                profiles.setdefault(candidate.version, candidate)
        return tuple(profiles.values())

    def tap_rows(self, logits: torch.Tensor, rows: Sequence[tuple[int, Binding]], positions: Sequence[int]) -> None:
        """Take the log-normalizers of `rows` of the unmodified logits, where the host knows rows and positions."""
        profiles = self.tapped_profiles(binding for _, binding in rows)
        tapped = [
            TappedRow(i, binding.nonce or "", binding.applied, position)
            for i, ((_, binding), position) in enumerate(zip(rows, positions, strict=True))
        ]
        values = self._log_normalizers(profiles, logits, self.on_device([row for row, _ in rows]))
        (host,), copied = self._to_host(values)
        self.taps.push(Step(tuple(p.version for p in profiles), host, tapped, copied=copied))

    def tap_slots(
        self,
        logits: torch.Tensor,
        slots: dict[int, SlotTap],
        profiles: tuple[HeldProfile, ...],
        rows: torch.Tensor,
        slot_of_row: torch.Tensor,
        pos: torch.Tensor,
    ) -> None:
        """The same for `rows` (int64, on the device) whose slots and positions only the device knows."""
        values = self._log_normalizers(profiles, logits, rows)
        (host, host_slots, host_pos), copied = self._to_host(values, slot_of_row, pos)
        versions = tuple(p.version for p in profiles)
        self.taps.push(Step(versions, host, slots=slots, slot_of_row=host_slots, pos=host_pos, copied=copied))

    def _log_normalizers(
        self, profiles: tuple[HeldProfile, ...], logits: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        if not profiles:
            return logits.new_empty((0, rows.shape[0]), dtype=torch.float32)
        return transform.log_normalizers(profiles, logits, rows)

    def _to_host(self, *tensors: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], Any]:
        """Copies on the host, and the event after which they are complete (None: they are)."""
        if self.device.type != "cuda":
            return tuple(t.to("cpu", copy=True) for t in tensors), None
        copies = []
        for tensor in tensors:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            copies.append(host.copy_(tensor, non_blocking=True))
        event = torch.cuda.Event()
        event.record()
        return tuple(copies), event
