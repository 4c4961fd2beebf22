"""The general plugin. It hands out answers of sampled requests (`answer_tap`) where HEMOSTAT_ADMIN_URL is set, and
brings adapters of Hemostat's into vLLM where HEMOSTAT_ADAPTERS is 1; otherwise it does nothing.

An adapter is a profile that vLLM serves as a LoRA adapter under the profile's version.

    install.py     what is changed in vLLM, after a check that it is there
    api_server.py  in the API server: finds an adapter by its version, and frees the engine's slot when it is unloaded
    source.py      fetches it from the admin port, and refuses what does not fit this engine
    folder.py      the private folder with the files that vLLM loads
    slots.py       in the worker: what is loaded, and the slot that is kept free
    state.py       what the agent reports of it
    punica.py      on a CPU: the operations that vLLM calls
    grouped.py     on a CPU: one matrix product for each adapter instead of a copy of its weights for each token
"""

from __future__ import annotations

import logging
import os

ENABLED = "HEMOSTAT_ADAPTERS"
"""The environment variable whose value 1 enables the plugin."""

log = logging.getLogger("vllm.hemostat")
"""The logger of adapters. It is below vLLM's logger, which alone has a handler in all of its processes."""


def register() -> None:
    """Registers the plugin; vLLM calls this entry point in every process, possibly several times. It never raises."""
    if os.environ.get("HEMOSTAT_ADMIN_URL"):
        try:
            from hemostat_engine import answer_tap  # noqa: PLC0415 - numpy only when enabled

            answer_tap.watch()
        except Exception as error:  # noqa: BLE001 - vLLM must start whatever happens here
            log.warning("answers are not handed out: %s: %s", type(error).__name__, error)
    if os.environ.get(ENABLED) != "1":
        return
    try:
        from hemostat_engine.adapters.install import install  # noqa: PLC0415 - torch and vLLM only when enabled

        install()
    except Exception as error:  # noqa: BLE001 - vLLM must start whatever happens here
        log.warning("adapters are off, vLLM is unchanged: %s: %s", type(error).__name__, error)
