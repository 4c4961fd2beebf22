"""vLLM's LoRAResolver: in the API server, when a request names a model that the server does not list."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import Callable
from typing import Any

from hemostat_calibration.profiles.profile import VERSION_PATTERN
from hemostat_engine.adapters.source import AdapterSource, Engine
from hemostat_engine.adapters.state import LORA_OFF, PROBE

log = logging.getLogger("vllm.hemostat")

NAME = "hemostat"
RESOLVE_SECONDS = 30.0
MAX_WAITING = 8
"""The largest number of look-ups at a time; further names are answered as unknown."""


class Resolver:
    """The logic, without vLLM's classes. One other thread does what blocks."""

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
