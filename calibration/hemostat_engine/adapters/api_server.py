"""Adapters in vLLM's API server: names that it does not list are looked up, and unloading frees the engine's slot,
which vLLM 0.32 leaves occupied.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import logging
import threading
import weakref
from collections.abc import Callable, Collection
from typing import Any

from hemostat_calibration.profiles.profile import VERSION_PATTERN
from hemostat_engine.adapters.source import AdapterSource, Engine
from hemostat_engine.adapters.state import LORA_OFF, PROBE

log = logging.getLogger("vllm.hemostat")

NAME = "hemostat"
RESOLVE_SECONDS = 30.0
MAX_WAITING = 8
"""The largest number of look-ups at a time; further names are answered as unknown."""
_WRAPPED = "_hemostat_wrapped"


class Resolver:
    """vLLM's LoRAResolver without its class: it is asked when a request names a model that the server does not list.
    One other thread does what blocks."""

    def __init__(
        self, source: AdapterSource, make_request: Callable[..., Any], engine: Callable[[], Engine] = Engine
    ) -> None:
        """make_request: vLLM's LoRARequest. engine: what is known of the engine now."""
        self._source = source
        self._make_request = make_request
        self._engine = engine
        self._room = threading.Semaphore(MAX_WAITING)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "hemostat-adapters")

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """Returns a LoRARequest whose id vLLM sets, or None: not an adapter of Hemostat's, or none that fits this
        engine. Raises ValueError for `PROBE`, and for every version where LoRA is off: vLLM answers 400 with its text,
        and logs no traceback. It would log one of its engine for each adapter that it is asked to load without LoRA.
        """
        if VERSION_PATTERN.fullmatch(lora_name) is None:
            return None
        if lora_name == PROBE:
            raise ValueError("Hemostat's resolver is here; no adapter has this name: hemostat check asks for it")
        engine = self._engine()
        if engine.lora is False:
            raise ValueError(f"adapter {lora_name} cannot be loaded: {LORA_OFF}")
        if not self._source.may_look_up(lora_name) or not self._room.acquire(blocking=False):
            return None
        try:
            result = self._thread.submit(self._source.find, lora_name, base_model_name, engine)
            result.add_done_callback(lambda _: self._room.release())
            async with asyncio.timeout(RESOLVE_SECONDS):
                path = await asyncio.shield(asyncio.wrap_future(result))
        except Exception as error:  # noqa: BLE001 - an unexpected error is answered as an unknown model
            log.warning("adapter %s is not loaded: %s: %s", lora_name, type(error).__name__, error)
            return None
        return None if path is None else self._request(lora_name, str(path))

    def _request(self, name: str, path: str) -> Any:
        return self._make_request(lora_name=name, lora_int_id=1, lora_path=path)


class Serving:
    """Holds the server's OpenAIServingModels, which it learns of when the server constructs it."""

    def __init__(self) -> None:
        self._models: Any = lambda: None

    def install(self, models_class: Any) -> None:
        """Wraps the constructor and `unload_lora_adapter` of OpenAIServingModels. Idempotent."""
        if _WRAPPED in vars(models_class):
            return
        setattr(models_class, _WRAPPED, True)
        construct, unload = models_class.__init__, models_class.unload_lora_adapter

        @functools.wraps(construct)
        def construct_and_note(models: Any, *arguments: Any, **named: Any) -> None:
            construct(models, *arguments, **named)
            self.update(models)

        @functools.wraps(unload)
        async def unload_and_free(models: Any, request: Any) -> Any:
            lora = models.lora_requests.get(request.lora_name)
            answer = await unload(models, request)
            if (
                lora is not None
                and VERSION_PATTERN.fullmatch(lora.lora_name)
                and (models.lora_requests.get(lora.lora_name) is not lora)
            ):
                await free(models, lora)
            return answer

        models_class.__init__ = construct_and_note
        models_class.unload_lora_adapter = unload_and_free

    def update(self, models: Any) -> None:
        self._models = weakref.ref(models)
        if self.engine().lora is False:
            log.warning("adapters are off: %s", LORA_OFF)

    def engine(self) -> Engine:
        """Returns what is known of the engine."""
        models = self._models()
        if models is None:
            return Engine()
        of_vllm = getattr(models.engine_client, "vllm_config", None)
        config = getattr(of_vllm, "lora_config", None)
        return Engine(
            vocab_size=models.model_config.get_vocab_size(),
            max_rank=getattr(config, "max_lora_rank", None),
            lora=None if of_vllm is None else config is not None,
            listed=functools.partial(_names, models.lora_requests),
        )


def _names(requests: dict[str, Any]) -> Collection[str]:
    # On another thread than the one that writes: a list of the keys is made in one step.
    return frozenset(list(requests))


async def free(models: Any, lora: Any) -> None:
    """Frees the slot in every rank of the engine; running requests that use the adapter load it again until they
    end."""
    try:
        await models.engine_client.remove_lora(lora.lora_int_id)
    except Exception as error:  # noqa: BLE001 - the name is gone already, which is what vLLM itself does
        log.warning("adapter %s stays in the engine's slot: %s: %s", lora.lora_name, type(error).__name__, error)
