"""Decides in the worker which adapters are in vLLM's slots, and which one gives way.

vLLM 0.32's operations on a CPU give rows without an adapter the one in the *last* slot. A slot is therefore kept free:
before an adapter is loaded, the least recently used one of Hemostat's that it no longer asks for is removed; and an
adapter of Hemostat's never takes the last free slot, except where the CPU's operations are Hemostat's own (`grouped`).
What vLLM does with adapters of clients is unchanged.

An adapter that cannot be loaded must not end the engine: a request that runs with it gets the model as it is.
"""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from hemostat_calibration.profiles.profile import VERSION_PATTERN
from hemostat_engine.adapters.state import AdapterState

log = logging.getLogger("vllm.hemostat")

_WRAPPED = "_hemostat_wrapped"
MAX_REMEMBERED = 1024
WARM_UP_PATH = "/not/a/real/path"
"""The path of the adapters that vLLM loads in its warm-up."""
STAND_IN_RANK = 1


def is_ours(name: str | None) -> bool:
    return name is not None and VERSION_PATTERN.fullmatch(name) is not None


class SlotKeeper:
    """Around the methods of one LRUCacheWorkerLoRAManager; all run on the engine's thread.

    `manager` below is vLLM's WorkerLoRAManager; its `_adapter_manager` has `lora_index_to_id`, the adapters' ids by
    slot.
    """

    def __init__(self, state: AdapterState) -> None:
        self._state = state
        self._names: OrderedDict[int, str] = OrderedDict()
        """The names of the adapters by id, the least recently used first."""
        self._unloaded: OrderedDict[int, None] = OrderedDict()
        self._failed: set[int] = set()
        self._in_step = False
        self._used: frozenset[int] = frozenset()
        """The ids of the adapters of the last forward pass."""

    def install(self, manager_class: Any) -> None:
        """Wraps the methods of LRUCacheWorkerLoRAManager. Idempotent."""
        if _WRAPPED in vars(manager_class):
            return
        setattr(manager_class, _WRAPPED, True)
        create, add, remove = manager_class.create_lora_manager, manager_class.add_adapter, manager_class.remove_adapter
        remove_all, apply = manager_class.remove_all_adapters, manager_class._apply_adapters

        @functools.wraps(create)
        def create_lora_manager(manager: Any, *arguments: Any, **named: Any) -> Any:
            model = create(manager, *arguments, **named)
            self._report(manager)
            return model

        @functools.wraps(add)
        def add_adapter(manager: Any, lora_request: Any) -> Any:
            return self.add(manager, lora_request, add)

        @functools.wraps(remove)
        def remove_adapter(manager: Any, adapter_id: int) -> Any:
            return self.remove(manager, adapter_id, remove)

        @functools.wraps(remove_all)
        def remove_all_adapters(manager: Any) -> None:
            remove_all(manager)
            self._report(manager)

        @functools.wraps(apply)
        def apply_adapters(manager: Any, lora_requests: Any) -> None:
            self.step(manager, lora_requests, apply)

        manager_class.create_lora_manager = create_lora_manager
        manager_class.add_adapter = add_adapter
        manager_class.remove_adapter = remove_adapter
        manager_class.remove_all_adapters = remove_all_adapters
        manager_class._apply_adapters = apply_adapters

    def step(self, manager: Any, requests: Iterable[Any], apply: Callable[..., None]) -> None:
        """Prepares the slots before a forward pass; `requests` are the adapters of its rows."""
        self._used = frozenset(request.lora_int_id for request in requests)
        self._in_step = True
        try:
            apply(manager, requests)
        finally:
            self._in_step = False
        if not self._unloaded:
            return
        idle = [i for i in _loaded(manager) if i in self._unloaded and i not in self._used]
        for ident in idle:
            manager._adapter_manager.remove_adapter(ident)
        if idle:
            self._report(manager)

    def add(self, manager: Any, request: Any, add: Callable[..., Any]) -> Any:
        """Loads the adapter into a slot if it is in none; returns what vLLM's own method returns."""
        ident, name = request.lora_int_id, request.lora_name
        if ident in _loaded(manager) and not getattr(request, "load_inplace", False):
            if ident in self._names:
                self._names.move_to_end(ident)
            return add(manager, request)
        if request.lora_path == WARM_UP_PATH:
            return add(manager, request)
        self._make_room(manager, ident, name)
        try:
            added = add(manager, request)
        except Exception as error:
            self._state.add("adapters_failed")
            # vLLM leaves an adapter whose shapes do not fit half written in its slot.
            manager._adapter_manager.remove_adapter(ident)
            self._report(manager)
            if not (self._in_step and is_ours(name)):
                raise
            log.warning("adapter %s: its requests get the model without it: %s: %s", name, type(error).__name__, error)
            added = self._stand_in(manager, ident)
            self._failed.add(ident)
        else:
            self._failed.discard(ident)
            if is_ours(name):
                self._state.add("adapters_loaded")
        self._names[ident] = name
        self._names.move_to_end(ident)
        while len(self._names) > MAX_REMEMBERED:
            self._names.popitem(last=False)
        self._report(manager)
        return added

    def remove(self, manager: Any, ident: int, remove: Callable[..., Any]) -> Any:
        """Frees the slot; returns what vLLM's own method returns. A running request that uses the adapter loads it
        again; it is removed again after that."""
        self._unloaded[ident] = None
        while len(self._unloaded) > MAX_REMEMBERED:
            self._unloaded.popitem(last=False)
        removed = remove(manager, ident)
        self._report(manager)
        return removed

    def _make_room(self, manager: Any, ident: int, name: str) -> None:
        """Removes adapters of Hemostat's that the control process does not ask for, until one slot is free in
        addition to the one needed."""
        slots = len(manager._adapter_manager.lora_index_to_id)
        while len(_loaded(manager)) + 1 >= slots:
            victim = self._victim(manager)
            if victim is None:
                break
            manager._adapter_manager.remove_adapter(victim)
            self._state.add("adapters_evicted")
        free = slots - len(_loaded(manager))
        needed = 1 if self._state.grouped else 2
        if is_ours(name) and not self._in_step and free < needed:
            self._report(manager)
            raise ValueError(
                f"{free} of {slots} slots are free: start vLLM with --max-loras {slots + needed - free} or more"
            )

    def _victim(self, manager: Any) -> int | None:
        """Returns the adapter that gives way. One of the pass that is being prepared never does; one of the last pass
        does if there is no other, and is loaded again where a request still runs."""
        loaded = _loaded(manager)
        ours = [i for i, name in self._names.items() if i in loaded and is_ours(name)]
        ours = [i for i in ours if i in self._unloaded or self._names[i] not in self._state.wanted]
        ours.sort(key=lambda i: (i in self._used, i not in self._unloaded))
        return next((i for i in ours if not (self._in_step and i in self._used)), None)

    def _stand_in(self, manager: Any, ident: int) -> bool:
        """Loads an adapter of zeros, so that the forward pass finds one. Returns True if it was added."""
        inner = manager._adapter_manager
        if len(inner) >= inner.capacity:
            inner.remove_oldest_adapter()
        zeros = inner.create_dummy_lora(ident, STAND_IN_RANK, manager.embedding_modules)
        added = bool(inner.add_adapter(zeros))
        inner.activate_adapter(ident)
        return added

    def _report(self, manager: Any) -> None:
        loaded = _loaded(manager)
        self._failed &= set(loaded)
        names = [None if i in self._failed else self._names.get(i) for i in loaded]
        slots = len(manager._adapter_manager.lora_index_to_id)
        self._state.set_loaded(names, slots, manager.lora_config.max_lora_rank)


def _loaded(manager: Any) -> list[int]:
    """Returns the ids of the adapters in slots."""
    return [ident for ident in manager._adapter_manager.lora_index_to_id if ident is not None]
