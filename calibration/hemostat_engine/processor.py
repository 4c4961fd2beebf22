"""The class that vLLM loads: it adapts both of vLLM's interfaces to `core`.

Model runner V1 calls a processor with rows that are requests, after the grammar's mask and before the penalties; V2
with rows that are not (reordered every step, several a request under speculative decoding), after them. vLLM chooses
the runner when it starts, for each model, so the class is a subclass of both abstract classes and detects the runner
from the arguments of its constructor.
"""

from __future__ import annotations

import functools
import importlib
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hemostat_calibration.errors import HemostatError
from hemostat_engine import answer_tap, forcing, xargs
from hemostat_engine.agent import Identity
from hemostat_engine.core import Binding, Core, Ranks
from hemostat_engine.masks import masks
from hemostat_engine.settings import Settings
from hemostat_engine.taps import Reading
from hemostat_engine.transform import HeldProfile
from hemostat_engine.weights import LoadedWeights

_INTERFACES = ("vllm.v1.sample.logits_processor", "vllm.v1.worker.gpu.sample.logits_processor")


def _interfaces() -> tuple[type, ...]:
    """Returns the abstract classes of the installed vLLM; only this function knows their modules."""
    result = []
    for name in _INTERFACES:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
            continue
        if hasattr(module, "LogitsProcessor"):
            result.append(module.LogitsProcessor)
    if not result:
        raise HemostatError(
            "this vLLM has no logits processor interface that Hemostat supports; use vLLM 0.32 or newer"
        )
    return tuple(result)


def _ranks(vllm_config: Any) -> Ranks:
    """Returns this worker's rank in its tensor-parallel group."""
    from vllm.distributed import parallel_state  # noqa: PLC0415 - only in workers

    sharded = bool(getattr(vllm_config.parallel_config, "enable_batch_sharded_sampling", False))
    if not parallel_state.model_parallel_is_initialized():
        return Ranks(sharded=sharded)
    group = parallel_state.get_tp_group()
    return Ranks(group.rank_in_group, group.world_size, group.cpu_group, sharded)


def _vllm_version() -> str:
    import vllm  # noqa: PLC0415 - the CPU build's distribution has another name, so metadata does not know

    return str(vllm.__version__)


def _hands_out_answers() -> bool:
    """Returns True if this vLLM's API server has what `answer_tap` wraps. It is not imported here: that is slow in a
    worker.
    """
    import vllm  # noqa: PLC0415

    return vllm.__file__ is not None and Path(vllm.__file__).with_name("v1").joinpath("engine", "async_llm.py").exists()


def _attention_layers(vllm_config: Any) -> Iterable[Any]:
    return list(vllm_config.compilation_config.static_forward_context.values())


def _core(vllm_config: Any, device: torch.device, vocab_size: int, runner: str) -> Core:
    watched, ranks = masks.watch(runner), _ranks(vllm_config)
    identity = Identity(
        boot_id=uuid.uuid4().hex,
        rank=ranks.rank,
        world_size=ranks.size,
        vocab_size=vocab_size,
        runner=runner,
        vllm=_vllm_version(),
        answers=_hands_out_answers(),
        # Of a draft that was rejected, it is not known which mask the token in its place was sampled from.
        sets=watched and getattr(vllm_config, "speculative_config", None) is None,
    )
    return Core(
        device=torch.device(device),
        identity=identity,
        ranks=ranks,
        settings=Settings.from_environment(),
        masks=masks,
        weights=LoadedWeights.of(getattr(vllm_config, "model_config", None)),
        kv_layers=functools.partial(_attention_layers, vllm_config),
    )


class BatchV1:
    """Model runner V1's persistent batch: row -> (binding, the request's list of output ids, which vLLM extends)."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._rows: dict[int, tuple[Binding, list[int]]] = {}

    def update(self, batch_update: Any) -> None:
        """Applies a BatchUpdate in vLLM's order: removed, added, moved (a move may be a swap)."""
        for row in batch_update.removed:
            self._rows.pop(row, None)
        bindings = self._core.bind([params for _, params, _, _ in batch_update.added])
        for (row, _, _, output_ids), binding in zip(batch_update.added, bindings, strict=True):
            self._put(row, None if binding is None else (binding, output_ids))
        for source, target, direction in batch_update.moved:
            moved, replaced = self._rows.pop(source, None), self._rows.pop(target, None)
            self._put(target, moved)
            if direction.name == "SWAP":
                self._put(source, replaced)

    def _put(self, row: int, entry: tuple[Binding, list[int]] | None) -> None:
        if entry is None:
            self._rows.pop(row, None)
        else:
            self._rows[row] = entry

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if not self._rows or not self._core.fits(logits):
            return logits
        tapped = [self._read(logits, measured=measured) for measured in (True, False)]
        self._core.apply_rows(logits, [(row, binding) for row, (binding, _) in self._rows.items()])
        for reading, rows in tapped:
            if reading is not None:
                # The id at this position is sampled after this call. Of the last position it is never seen here.
                ids = [self._rows[row][1] for row, _ in rows]
                self._core.tap_rows(reading, rows, [(len(output), output[-1] if output else -1) for output in ids])
        self._force(logits)
        return logits

    def _force(self, logits: torch.Tensor) -> None:
        ids = [-1] * logits.shape[0]
        for row, (binding, output) in self._rows.items():
            if len(output) < len(binding.forced):
                ids[row] = binding.forced[len(output)]
        if max(ids) >= 0:
            forcing.force(logits, self._core.on_device(ids))

    def _read(self, logits: torch.Tensor, *, measured: bool) -> tuple[Reading | None, list[tuple[int, Binding]]]:
        """Returns what is read of the tapped rows, and these rows with their bindings."""
        rows = [
            (row, binding)
            for row, (binding, _) in self._rows.items()
            if binding.nonce is not None and binding.measured is measured
        ]
        if not rows:
            return None, rows
        bindings = [binding for _, binding in rows]
        return self._core.read(bindings, logits, lambda: (self._core.on_device([row for row, _ in rows]),)), rows


class SlotsV2:
    """Model runner V2's request slots: slot -> binding, and the prompt's length for the positions of taps.

    vLLM reuses slots without notice, so an admission overwrites the previous request.
    """

    def __init__(self, core: Core, req_states: Any) -> None:
        self._core = core
        self._req_states = req_states
        self._slots: dict[int, Binding] = {}
        self._prompt_lens: dict[int, int] = {}
        self._admitted: dict[int, Any] = {}
        self._active = np.zeros(req_states.max_num_reqs, dtype=bool)

    def add(self, slot: int, params: Any) -> bool:
        """Frees the slot and queues the request for `bind`. Returns whether it has parameters of Hemostat."""
        self._slots.pop(slot, None)
        self._admitted.pop(slot, None)
        self._active[slot] = False
        has_parameters = xargs.has_parameters(params.extra_args)
        if has_parameters:
            self._admitted[slot] = params
            self._prompt_lens[slot] = int(self._req_states.prompt_len.np[slot])
        return has_parameters

    def bind(self) -> None:
        """Binds all requests admitted in this step, with one all-reduce among the ranks."""
        if not self._admitted:
            return
        admitted, self._admitted = self._admitted, {}
        for slot, binding in zip(admitted, self._core.bind(list(admitted.values())), strict=True):
            if binding is not None:
                self._slots[slot] = binding
                self._active[slot] = True

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        batch = ctx.idx_mapping_np
        if not self._active[batch].any() or not self._core.fits(logits):
            return logits
        bound = [(row, slot) for row, slot in enumerate(batch.tolist()) if self._active[slot]]
        if logits.shape[0] == len(batch):
            self._apply_plain(logits, bound, ctx)
        else:
            self._apply_expanded(logits, bound, ctx)
        self._force(logits, [slot for _, slot in bound if self._slots[slot].forced], ctx)
        return logits

    def _force(self, logits: torch.Tensor, slots: list[int], ctx: Any) -> None:
        if not slots:
            return
        ids = torch.full_like(ctx.pos, -1, dtype=torch.int64)
        for slot in slots:
            tokens, positions = self._core.on_device(self._slots[slot].forced), ctx.pos + 1 - self._prompt_lens[slot]
            ids = forcing.put(ids, tokens, positions, ctx.expanded_idx_mapping == slot)
        forcing.force(logits, ids)

    def _tapped(self, bound: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        """Yields the pairs that are tapped, in groups that are read together."""
        for measured in (True, False):
            group = [
                (row, slot)
                for row, slot in bound
                if self._slots[slot].nonce is not None and self._slots[slot].measured is measured
            ]
            if group:
                yield group

    def _apply_plain(self, logits: torch.Tensor, bound: list[tuple[int, int]], ctx: Any) -> None:
        """Applies profiles to one row for each request, in the batch's order."""

        def where(tapped: list[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
            rows = self._core.on_device([row for row, _ in tapped])
            return rows, *_places(ctx, rows), ctx.input_ids.index_select(0, rows)

        readings = [(self._read(logits, tapped, where), tapped) for tapped in self._tapped(bound)]
        self._core.apply_rows(logits, [(row, self._slots[slot]) for row, slot in bound])
        self._tap(readings)

    def _apply_expanded(self, logits: torch.Tensor, bound: list[tuple[int, int]], ctx: Any) -> None:
        """Applies profiles under speculative decoding, with several rows a request. Only the device knows which, so
        rows are selected there."""

        def where(_: list[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
            rows = torch.arange(logits.shape[0], device=logits.device)
            # Draft tokens are fed that may be rejected.
            return rows, *_places(ctx, rows), torch.full_like(rows, -1)

        def mask(chosen: list[int]) -> torch.Tensor:
            slot_of_row = ctx.expanded_idx_mapping
            return torch.isin(slot_of_row, self._core.on_device(chosen).to(slot_of_row.dtype))

        readings = [(self._read(logits, tapped, where), tapped) for tapped in self._tapped(bound)]
        by_version: dict[str, tuple[HeldProfile, list[int]]] = {}
        for _, slot in bound:
            profile = self._slots[slot].profile
            if profile is not None:
                by_version.setdefault(profile.version, (profile, []))[1].append(slot)
        for profile, chosen in by_version.values():
            self._core.apply_where(logits, profile, functools.partial(mask, chosen), len(chosen))
        self._tap(readings)

    def _read(
        self,
        logits: torch.Tensor,
        tapped: list[tuple[int, int]],
        where: Callable[[list[tuple[int, int]]], tuple[torch.Tensor, ...]],
    ) -> Reading | None:
        return self._core.read([self._slots[slot] for _, slot in tapped], logits, lambda: where(tapped))

    def _tap(self, readings: list[tuple[Reading | None, list[tuple[int, int]]]]) -> None:
        for reading, tapped in readings:
            if reading is not None:
                slots = {slot: (self._slots[slot], self._prompt_lens[slot]) for _, slot in tapped}
                self._core.tap_slots(reading, slots, [row for row, _ in tapped])


def _places(ctx: Any, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the slots and positions of the rows."""
    return ctx.expanded_idx_mapping.index_select(0, rows), ctx.pos.index_select(0, rows)


class LogitsProcessor(*_interfaces()):  # type: ignore[misc] # the bases depend on the vLLM that is installed
    """The class that vLLM loads with `--logits-processors hemostat_engine:LogitsProcessor`."""

    def __init__(self, vllm_config: Any, device_or_states: Any, is_pin_memory: bool | None = None) -> None:
        """Takes the arguments of either interface. V1: (vllm_config, device, is_pin_memory). V2: (vllm_config,
        req_states).
        """
        if is_pin_memory is None:
            states = device_or_states
            core = _core(vllm_config, states.device, states.vocab_size, "v2")
            self._slots: SlotsV2 = SlotsV2(core, states)
        else:
            core = _core(vllm_config, device_or_states, vllm_config.model_config.get_vocab_size(), "v1")
            self._batch: BatchV1 = BatchV1(core)
        self.core = core

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Checks the parameters; the frontend calls it for each request: a ValueError becomes HTTP 400 with its
        text."""
        # Whether the other keys count is known in the engine; a refusal here would tell clients about them.
        xargs.parse(sampling_params.extra_args, signed=False)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """Updates the batch of V1 before each forward pass; None if the batch did not change."""
        self.core.masks.begin()
        if batch_update is not None:
            self._batch.update(batch_update)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Adds a request, as model runner V2 calls it; returns True if it has parameters of Hemostat."""
        return self._slots.add(req_idx, sampling_params)

    def apply_staged_writes(self) -> None:
        """Binds the requests of V2 once a step, after its admissions and before the forward pass."""
        self.core.masks.begin()
        self._slots.bind()

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """Applies the profiles in place, and returns the logits. V1 calls it with (logits), V2 with (logits, ctx)."""
        return self._batch.apply(logits) if ctx is None else self._slots.apply(logits, ctx)


# vLLM's API server imports this module when it starts, to check requests' parameters.
answer_tap.install()
