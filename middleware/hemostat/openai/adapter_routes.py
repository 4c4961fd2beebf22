"""The routes by which LoRA adapters are loaded and unloaded, which the relay refuses to clients.

vLLM serves them where VLLM_ALLOW_RUNTIME_LORA_UPDATING is set, which adapters of Hemostat's need: there anybody who
reaches the port could replace an adapter, or load one from any path of the server. In vLLM 0.32
(`entrypoints/serve/lora/api_router.py`) they are POST /v1/load_lora_adapter, POST /v1/unload_lora_adapter, and
SageMaker's names for the two, POST /adapters and DELETE /adapters/NAME.
"""

from __future__ import annotations

import re
from urllib.parse import unquote_to_bytes

ADAPTER_ROUTE_REFUSED = (
    "Adapters cannot be loaded or unloaded through Hemostat. Use the vLLM server itself, or set "
    "upstream.allow_adapter_routes: true."
)
_SEGMENTS = frozenset((b"load_lora_adapter", b"unload_lora_adapter", b"adapters"))
_separator = re.compile(rb"[/\\?#]")
_MAX_DECODED = 4
"""The largest number of times that a target is decoded: every proxy between Hemostat and vLLM may do so once."""


def loads_adapters(target: bytes) -> bool:
    """Returns True if a request's target (in origin form) may reach one of these routes.

    The path is compared by its segments, in any place (vLLM's --root-path), any case, with percent-encoding, doubled
    slashes, dots or a fragment: what a server or a proxy may normalize must not get around this.
    """
    path = target.partition(b"?")[0].partition(b"#")[0]
    for _ in range(_MAX_DECODED):
        if b"%" not in path:
            break
        path = unquote_to_bytes(path)
    return not _SEGMENTS.isdisjoint(_separator.split(path.lower()))
