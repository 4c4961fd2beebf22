"""The slots of a worker: one stays free, what nobody wants gives way, nothing ends the engine."""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemostat.engines.messages import LoraState, RankReport
from hemostat_engine.adapters.slots import WARM_UP_PATH, SlotKeeper
from hemostat_engine.adapters.state import AdapterState


@dataclass(frozen=True)
class Request:
    """vLLM's LoRARequest."""

    lora_name: str
    lora_int_id: int
    lora_path: str = "/adapters"


def version(i: int) -> str:
    return f"{i:032x}"


class Inner:
    """vLLM's LRUCacheLoRAModelManager: adapters in slots, the least recently used one gives way."""

    def __init__(self, slots: int) -> None:
        self.lora_index_to_id: list[int | None] = [None] * slots
        self.registered: OrderedDict[int, Any] = OrderedDict()
        self.capacity = slots

    def __len__(self) -> int:
        return len(self.registered)

    def create_dummy_lora(self, ident: int, rank: int, embedding_modules: Any) -> Any:
        return SimpleNamespace(id=ident, zeros=True)

    def add_adapter(self, model: Any) -> bool:
        self.registered[model.id] = model
        return True

    def activate_adapter(self, ident: int) -> None:
        self.registered.move_to_end(ident)
        if ident not in self.lora_index_to_id:
            self.lora_index_to_id[self.lora_index_to_id.index(None)] = ident

    def remove_oldest_adapter(self) -> None:
        self.remove_adapter(next(iter(self.registered)))

    def remove_adapter(self, ident: int) -> bool:
        if ident in self.lora_index_to_id:
            self.lora_index_to_id[self.lora_index_to_id.index(ident)] = None
        return self.registered.pop(ident, None) is not None


def manager_class(state: AdapterState) -> Any:
    """vLLM's LRUCacheWorkerLoRAManager, wrapped."""

    class Manager:
        def __init__(self, slots: int) -> None:
            self.slots = slots
            self.embedding_modules: dict[str, str] = {}
            self.lora_config = SimpleNamespace(max_lora_rank=16)
            self.broken: set[int] = set()
            self.misfits: set[int] = set()

        def create_lora_manager(self) -> str:
            self._adapter_manager = Inner(self.slots)
            return "model"

        def add_adapter(self, request: Request) -> bool:
            inner = self._adapter_manager
            if request.lora_int_id not in inner.registered:
                if request.lora_int_id in self.broken:
                    raise FileNotFoundError("adapter_config.json")
                if len(inner) >= inner.capacity:
                    inner.remove_oldest_adapter()
                inner.add_adapter(SimpleNamespace(id=request.lora_int_id, zeros=False))
            inner.activate_adapter(request.lora_int_id)
            if request.lora_int_id in self.misfits:
                raise RuntimeError("The size of tensor a must match the size of tensor b")
            return True

        def remove_adapter(self, ident: int) -> bool:
            return self._adapter_manager.remove_adapter(ident)

        def remove_all_adapters(self) -> None:
            self._adapter_manager = Inner(self.slots)

        def _apply_adapters(self, requests: set[Request]) -> None:
            for request in requests:
                self.add_adapter(request)

    keeper = SlotKeeper(state)
    keeper.install(Manager)
    keeper.install(Manager)
    return Manager


def started(slots: int = 2, grouped: bool = False) -> tuple[Any, AdapterState]:
    state = AdapterState()
    state.grouped = grouped
    manager = manager_class(state)(slots)
    assert state.report() == {}
    assert manager.create_lora_manager() == "model"
    return manager, state


def loaded(manager: Any) -> set[int]:
    return {i for i in manager._adapter_manager.lora_index_to_id if i is not None}


def test_report_says_what_is_loaded() -> None:
    manager, state = started(3)
    manager.add_adapter(Request(version(1), 1))
    manager.add_adapter(Request("clients-own", 2))
    assert state.report() == {
        "adapters": [version(1)],
        "lora": {"slots": 3, "max_rank": 16, "grouped": False, "loaded": 2, "was_full": False},
    }
    import msgspec

    fields = {"boot_id": "b", "rank": 0, "world_size": 1, "versions": [], "vocab_size": 8, "counters": {}}
    body = fields | {"runner": "v1", "vllm": "0"} | state.report()
    report = msgspec.json.decode(msgspec.json.encode(body), type=RankReport)
    assert report.lora == LoraState(slots=3, max_rank=16, grouped=False, loaded=2, was_full=False)


def test_unwanted_adapter_gives_way_and_the_last_slot_stays_free() -> None:
    manager, state = started(3)
    for i in (1, 2):
        manager.add_adapter(Request(version(i), i))
    manager._apply_adapters({Request(version(1), 1)})  # used later than 2
    manager.add_adapter(Request(version(3), 3))
    assert loaded(manager) == {1, 3}
    state.want([version(1)])
    manager.add_adapter(Request(version(4), 4))
    assert loaded(manager) == {1, 4}
    state.want([version(1), version(4)])
    with pytest.raises(ValueError, match="--max-loras 4"):
        manager.add_adapter(Request(version(5), 5))
    assert loaded(manager) == {1, 4}
    assert state.report()["lora"]["was_full"] is False
    assert state.counters() == {"adapters_loaded": 4, "adapters_evicted": 2}


def test_grouped_product_needs_no_free_slot_but_never_displaces_a_wanted_adapter() -> None:
    manager, state = started(2, grouped=True)
    state.want([version(1), version(2)])
    for i in (1, 2):
        manager.add_adapter(Request(version(i), i))
    assert loaded(manager) == {1, 2}
    assert state.report()["lora"]["was_full"] is True
    with pytest.raises(ValueError, match="--max-loras 3"):
        manager.add_adapter(Request(version(3), 3))
    manager.remove_adapter(1)
    manager.add_adapter(Request(version(3), 3))
    assert loaded(manager) == {2, 3}


def test_one_slot_serves_only_with_the_grouped_product() -> None:
    manager, _ = started(1)
    with pytest.raises(ValueError, match="--max-loras 2"):
        manager.add_adapter(Request(version(1), 1))
    manager, _ = started(1, grouped=True)
    manager.add_adapter(Request(version(1), 1))
    assert loaded(manager) == {1}


def test_clients_own_adapters_are_loaded_as_vllm_does() -> None:
    manager, state = started(2)
    state.want([version(1)])
    manager.add_adapter(Request(version(1), 1))
    manager.add_adapter(Request("a", 2))
    manager.add_adapter(Request("b", 3))
    assert loaded(manager) == {2, 3}
    assert state.report()["lora"]["was_full"] is True


def test_unloaded_adapter_is_gone_when_its_last_request_has_ended() -> None:
    manager, _ = started(3)
    ours = Request(version(1), 1)
    manager.add_adapter(ours)
    assert manager.remove_adapter(1)
    assert loaded(manager) == set()
    # A request that still runs needs it: vLLM loads it again from its path.
    manager._apply_adapters({ours})
    assert loaded(manager) == {1}
    manager._apply_adapters({ours, Request("own", 2)})
    assert loaded(manager) == {1, 2}
    manager._apply_adapters(set())
    assert loaded(manager) == {2}


def test_adapter_of_the_step_never_gives_way_in_it() -> None:
    manager, _ = started(2)
    ours, own = Request(version(1), 1), Request("own", 2)
    manager.add_adapter(ours)
    manager._apply_adapters({ours, own})
    assert loaded(manager) == {1, 2}


def test_load_that_fails_in_a_step_gives_the_model_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    manager, state = started(3)
    manager.broken.add(1)
    with pytest.raises(FileNotFoundError):
        manager.add_adapter(Request(version(1), 1))
    with caplog.at_level(logging.WARNING):
        manager._apply_adapters({Request(version(1), 1)})
    assert manager._adapter_manager.registered[1].zeros
    (record,) = caplog.records
    assert version(1) in record.getMessage()
    assert state.report()["adapters"] == []
    assert state.report()["lora"]["loaded"] == 1
    assert state.counters() == {"adapters_failed": 2}
    # A client's own: as in vLLM.
    manager.broken.add(2)
    with pytest.raises(FileNotFoundError):
        manager._apply_adapters({Request("own", 2)})


def test_adapter_of_other_shapes_leaves_no_slot_in_use() -> None:
    manager, state = started(3)
    manager.misfits = {1, 2}
    for i in (1, 2):
        with pytest.raises(RuntimeError):
            manager.add_adapter(Request(version(i), i))
    assert loaded(manager) == set()
    assert state.report()["lora"]["loaded"] == 0
    manager.add_adapter(Request(version(3), 3))
    assert loaded(manager) == {3}


def test_warm_up_changes_nothing() -> None:
    manager, state = started(2)
    manager._apply_adapters({Request(f"warmup_{i}", i, WARM_UP_PATH) for i in (1, 2)})
    manager.remove_all_adapters()
    assert state.report()["lora"] == {
        "slots": 2, "max_rank": 16, "grouped": False, "loaded": 0, "was_full": False
    }  # fmt: skip
    manager.add_adapter(Request(version(1), 1))
    assert loaded(manager) == {1}


@given(
    st.integers(1, 4),
    st.booleans(),
    st.lists(st.tuples(st.sampled_from(["add", "unload", "step", "want"]), st.sets(st.integers(1, 6))), max_size=30),
)
def test_ours_alone_never_fill_the_slots_and_a_step_has_its_adapters(
    slots: int, grouped: bool, actions: list[tuple[str, set[int]]]
) -> None:
    manager, state = started(slots, grouped)
    for action, ids in actions:
        if action == "want":
            state.want([version(i) for i in ids])
        elif action == "step":
            # vLLM schedules requests with at most as many adapters as there are slots.
            chosen = set(sorted(ids & loaded(manager))[:slots])
            manager._apply_adapters({Request(version(i), i) for i in chosen})
            assert chosen <= loaded(manager)
        else:
            for i in ids:
                if action == "unload":
                    manager.remove_adapter(i)
                    assert i not in loaded(manager)
                    continue
                try:
                    manager.add_adapter(Request(version(i), i))
                except ValueError:
                    assert i not in loaded(manager)
        assert len(loaded(manager)) <= slots - (0 if grouped else 1)
        assert set(state.report()["adapters"]) == {version(i) for i in loaded(manager)}
    assert state.report()["lora"]["was_full"] is False or grouped
