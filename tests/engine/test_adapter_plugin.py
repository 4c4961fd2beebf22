"""The general plugin's entry point: what it does not do, and what it changes in vLLM."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import hemostat_engine.adapters as plugin
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_engine.adapters.install import AdapterSettings

UNCHANGED = """
import sys
from hemostat_engine.adapters import register
register()
assert not {"torch", "vllm", "numpy"} & set(sys.modules), sorted(sys.modules)
"""


def with_methods(name: str, methods: Iterable[str]) -> type:
    return type(name, (), {method: lambda *_: None for method in methods})


def run(code: str, **environment: str) -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HEMOSTAT_")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("value", [None, "", "0", "true"])
def test_nothing_is_imported_unless_it_is_enabled(value: str | None) -> None:
    run(UNCHANGED, **({} if value is None else {"HEMOSTAT_ADAPTERS": value}))


def test_enabled_it_changes_vllm_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from hemostat_engine.adapters import install, punica
    from hemostat_engine.adapters.state import AdapterState

    manager = with_methods("Manager", install.MANAGER_METHODS)
    models = with_methods("OpenAIServingModels", ("unload_lora_adapter",))
    wrapper = with_methods("PunicaWrapperCPU", punica.METHODS)
    registered: dict[str, Any] = {}
    modules: dict[str, Any] = {
        "vllm.lora.resolver": SimpleNamespace(
            LoRAResolver=object, LoRAResolverRegistry=SimpleNamespace(register_resolver=registered.__setitem__)
        ),
        "vllm.lora.request": SimpleNamespace(LoRARequest=object),
        "vllm.lora.worker_manager": SimpleNamespace(LRUCacheWorkerLoRAManager=manager),
        "vllm.lora.punica_wrapper.punica_cpu": SimpleNamespace(PunicaWrapperCPU=wrapper),
        "vllm.platforms": SimpleNamespace(current_platform=SimpleNamespace(is_cpu=lambda: True)),
    }
    state = AdapterState()
    monkeypatch.setattr(install.importlib, "import_module", modules.__getitem__)
    monkeypatch.setitem(sys.modules, install.SERVING_MODULE, SimpleNamespace(OpenAIServingModels=models))
    monkeypatch.setattr(install, "state", state)
    monkeypatch.setattr(install, "_installed", False)
    monkeypatch.setenv("HEMOSTAT_ADAPTERS", "1")
    before = [dict(vars(c)) for c in (manager, models, wrapper)]
    plugin.register()
    changed = [dict(vars(c)) for c in (manager, models, wrapper)]
    for old, new in zip(before, changed, strict=True):
        assert all(new[name] is not old[name] for name in old if not name.startswith("__"))
    assert list(registered) == ["hemostat"]
    assert state.grouped
    for installed in (True, False):
        monkeypatch.setattr(install, "_installed", installed)
        plugin.register()
        assert [dict(vars(c)) for c in (manager, models, wrapper)] == changed


def test_failure_is_one_line_and_does_not_reach_vllm(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("something new")

    install = ModuleType("install")
    install.install = fail  # type: ignore[attr-defined]
    monkeypatch.setenv("HEMOSTAT_ADAPTERS", "1")
    monkeypatch.setitem(sys.modules, "hemostat_engine.adapters.install", install)
    with caplog.at_level(logging.WARNING):
        plugin.register()
    assert [record.getMessage() for record in caplog.records] == [
        "adapters are off, vLLM is unchanged: RuntimeError: something new"
    ]


def test_vllm_that_lacks_a_name_is_left_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("torch")
    from hemostat_engine.adapters import install

    manager = with_methods("Manager", ("add_adapter",))
    resolvers = SimpleNamespace(LoRAResolver=object, LoRAResolverRegistry=SimpleNamespace(register_resolver=None))
    modules: dict[str, Any] = {
        "vllm.lora.resolver": resolvers,
        "vllm.lora.request": SimpleNamespace(LoRARequest=object),
        "vllm.lora.worker_manager": SimpleNamespace(LRUCacheWorkerLoRAManager=manager),
    }
    monkeypatch.setattr(install, "_installed", False)
    monkeypatch.setattr(install.importlib, "import_module", modules.__getitem__)
    monkeypatch.setenv("HEMOSTAT_ADAPTERS", "1")
    before = dict(vars(manager))
    with caplog.at_level(logging.WARNING):
        plugin.register()
    (record,) = caplog.records
    assert "Manager has no create_lora_manager, remove_adapter" in record.getMessage()
    assert dict(vars(manager)) == before


def test_settings_come_from_the_environment() -> None:
    assert AdapterSettings.from_environment({}) == AdapterSettings(None, True)
    result = AdapterSettings.from_environment({"HEMOSTAT_ADAPTERS_CPU_PRODUCT": "0", "HEMOSTAT_ADAPTER_DIR": "/x"})
    assert (str(result.folder), result.cpu_product) == ("/x", False)
    with pytest.raises(InvalidArgumentError, match="must be 0 or 1"):
        AdapterSettings.from_environment({"HEMOSTAT_ADAPTERS_CPU_PRODUCT": "yes"})
