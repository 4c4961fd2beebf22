"""Applies the plugin's changes to vLLM. All names are looked up first: if one is missing, nothing is changed."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hemostat_calibration.errors import HemostatError, InvalidArgumentError
from hemostat_engine.adapters import punica
from hemostat_engine.adapters.api_server import NAME, Resolver, Serving
from hemostat_engine.adapters.folder import AdapterFolder
from hemostat_engine.adapters.slots import SlotKeeper
from hemostat_engine.adapters.source import AdapterSource
from hemostat_engine.adapters.state import state
from hemostat_engine.peers import Peers
from hemostat_engine.settings import Settings


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """The settings of adapters. folder: the folder in which adapters are written; None: the folder for temporary files.
    cpu_product: see `grouped`.
    """

    folder: Path | None = None
    cpu_product: bool = True

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> AdapterSettings:
        """Returns the settings from HEMOSTAT_ADAPTER_DIR and HEMOSTAT_ADAPTERS_CPU_PRODUCT. Raises
        InvalidArgumentError."""
        product = environment.get("HEMOSTAT_ADAPTERS_CPU_PRODUCT") or "1"
        if product not in ("0", "1"):
            raise InvalidArgumentError(f"HEMOSTAT_ADAPTERS_CPU_PRODUCT is {product!r}: it must be 0 or 1")
        folder = environment.get("HEMOSTAT_ADAPTER_DIR") or None
        return cls(Path(folder) if folder else None, product == "1")


log = logging.getLogger("vllm.hemostat")

SERVING_MODULE = "vllm.entrypoints.openai.models.serving"
MANAGER_METHODS = (
    "create_lora_manager",
    "add_adapter",
    "remove_adapter",
    "remove_all_adapters",
    "_apply_adapters",
)

_installed = False


def install() -> None:
    """Changes vLLM in this process; a second call changes nothing. Raises HemostatError before anything is changed."""
    global _installed  # noqa: PLW0603 - vLLM calls the entry point several times in a process
    if _installed:
        return
    settings, sources = AdapterSettings.from_environment(), Settings.from_environment()
    resolvers = _module("vllm.lora.resolver", ("LoRAResolver", "LoRAResolverRegistry"))
    requests = _module("vllm.lora.request", ("LoRARequest",))
    managers = _module("vllm.lora.worker_manager", ("LRUCacheWorkerLoRAManager",))
    manager_class = managers.LRUCacheWorkerLoRAManager
    _check(manager_class, MANAGER_METHODS)
    _check(resolvers.LoRAResolverRegistry, ("register_resolver",))
    serving = Serving()
    models_class = _models_class()
    if models_class is not None:
        _check(models_class, ("unload_lora_adapter",))
        serving.install(models_class)
    source = AdapterSource(Peers(sources), AdapterFolder(settings.folder), sources.profile_dir)
    resolver = Resolver(source, requests.LoRARequest, serving.engine)
    resolvers.LoRAResolverRegistry.register_resolver(NAME, _resolver_of(resolvers.LoRAResolver, resolver))
    SlotKeeper(state).install(manager_class)
    state.grouped = settings.cpu_product and _install_product()
    _installed = True


def _install_product() -> bool:
    """Replaces the CPU's operations; returns False on other devices, and if the operations of this vLLM are not the
    known ones."""
    platform = importlib.import_module("vllm.platforms").current_platform
    if not platform.is_cpu():
        return False
    try:
        wrappers = _module("vllm.lora.punica_wrapper.punica_cpu", ("PunicaWrapperCPU",))
        _check(wrappers.PunicaWrapperCPU, punica.METHODS)
    except HemostatError as error:
        log.warning("the CPU's LoRA operations stay vLLM's own: %s", error)
        return False
    punica.install(wrappers.PunicaWrapperCPU)
    return True


def _models_class() -> Any:
    """Returns OpenAIServingModels in a process that has imported it, the API server; None in others."""
    module = sys.modules.get(SERVING_MODULE)
    return getattr(module, "OpenAIServingModels", None)


def _resolver_of(base: Any, resolver: Resolver) -> Any:
    """Returns an instance of vLLM's abstract class."""

    class HemostatResolver(base):  # type: ignore[misc] # the base is vLLM's
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            return await resolver.resolve_lora(base_model_name, lora_name)

    return HemostatResolver()


def _module(name: str, attributes: tuple[str, ...]) -> Any:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise HemostatError(f"this vLLM has no {name} that can be imported ({error})") from None
    _check(module, attributes)
    return module


def _check(owner: Any, names: tuple[str, ...]) -> None:
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        name = getattr(owner, "__name__", type(owner).__name__)
        raise HemostatError(f"this vLLM's {name} has no {', '.join(missing)}")
