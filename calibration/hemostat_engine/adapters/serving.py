"""The API server's list of adapters: unloading frees the engine's slot, which vLLM 0.32 leaves occupied."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Collection
from typing import Any

from hemostat_calibration.profiles.profile import VERSION_PATTERN
from hemostat_engine.adapters.source import Engine
from hemostat_engine.adapters.state import LORA_OFF

log = logging.getLogger("vllm.hemostat")

_WRAPPED = "_hemostat_wrapped"


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
