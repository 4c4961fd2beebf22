"""Checksums of the weights that an engine holds in its memory, tensor by tensor, for the control process.

vLLM computes them (`AsyncLLM.compute_weight_checksums`) while the engine stands still: about a second for each 1 to 2
GB. So they are computed only if no request is in progress.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from hemostat_calibration.canary_weights import BUSY

log = logging.getLogger("vllm.hemostat")

DIGEST_CHARACTERS = 32
"""The number of a digest's first characters that are sent."""
MAX_TENSORS = 1 << 16


async def measure(engine: Any, nonce: str, in_progress: int) -> dict[str, Any]:
    """Returns the message with the checksums, or with the reason why there are none. Never raises.

    engine: vLLM's AsyncLLM. nonce: of the request that asks for them. in_progress: the number of other requests.
    """
    try:
        if in_progress:
            return _nothing(nonce, BUSY)
        if not hasattr(engine, "compute_weight_checksums"):
            return _nothing(nonce, "this vLLM computes no checksums")
        begun = time.monotonic()
        digests: dict[str, str] = {}
        for of_rank in await engine.compute_weight_checksums():
            digests |= {str(name): str(digest)[:DIGEST_CHARACTERS] for name, digest in of_rank.items()}
        if not digests or len(digests) > MAX_TENSORS:
            return _nothing(nonce, f"{len(digests)} tensors")
        seconds = time.monotonic() - begun
        return {"nonce": nonce, "digests": digests, "facts": facts(engine), "seconds": seconds, "detail": ""}
    except Exception as error:  # noqa: BLE001 - the engine must serve whatever happens here
        log.warning("the weights have no checksums: %s: %s", type(error).__name__, error)
        return _nothing(nonce, f"{type(error).__name__}: {error}"[:200])


def facts(engine: Any) -> dict[str, str]:
    """Returns what kernels and the layout of weights depend on, as far as this version of vLLM says it."""
    config = getattr(engine, "vllm_config", None)
    named = {
        "dtype": ("model_config", "dtype"),
        "quantization": ("model_config", "quantization"),
        "KV cache dtype": ("cache_config", "cache_dtype"),
        "attention backend": ("attention_config", "backend"),
        "tensor parallel size": ("parallel_config", "tensor_parallel_size"),
        "pipeline parallel size": ("parallel_config", "pipeline_parallel_size"),
        "data parallel size": ("parallel_config", "data_parallel_size"),
        "expert parallel": ("parallel_config", "enable_expert_parallel"),
        "expert load balancing": ("parallel_config", "enable_eplb"),
    }
    found = {name: getattr(getattr(config, part, None), field, None) for name, (part, field) in named.items()}
    found |= {"vLLM": _version(), "device": _device()}
    return {name: str(value)[:200] for name, value in found.items() if value is not None}


def _version() -> str:
    import vllm  # noqa: PLC0415

    return str(vllm.__version__)


def _device() -> str:
    from vllm.platforms import current_platform  # noqa: PLC0415

    try:
        return str(current_platform.get_device_name())
    except Exception:  # noqa: BLE001 - a platform without names
        return str(getattr(current_platform, "device_name", ""))


def _nothing(nonce: str, why: str) -> dict[str, Any]:
    return {"nonce": nonce, "digests": {}, "facts": {}, "seconds": 0.0, "detail": why}
