"""The vLLM plugin: `--logits-processors hemostat_engine:LogitsProcessor`.

Importing this package is cheap and has no effect: no entry point is registered, and torch and vLLM are imported only
when the class is requested by that flag.

    processor.py     the adapters for vLLM's two interfaces (model runners V1 and V2)
    core.py          what both share: binding requests to profiles, applying profiles, tapping rows
    transform.py     profile x logits in torch; `hemostat_calibration.profiles.transform` has it in numpy
    product.py       the matrix product of a contextual profile
    xargs.py         the request parameters in `vllm_xargs`
    library.py       the profiles in memory, and the counters
    masks.py         which ids a grammar allows: vLLM's bitmask, where its runner applies it
    taps.py          measured values of tapped rows, from the engine's thread to the agent's
    agent.py         the background thread: reports, sends taps
    answer_tap.py    in the API server's process: whole answers of requests that ask for it; answer_sender.py sends them
    passive.py       in the same process: which requests are sampled where no relay does
    client_headers.py    the ASGI middleware that hands clients' headers to it
    fetching.py      gets profiles from the folder or the admin ports
    peers.py, admin_client.py, retries.py, settings.py    addresses, HTTP, pauses after failures, environment

Further modules:

    captures      keeps loads onto a GPU away from the times at which vLLM captures a CUDA graph
    checksums     checksums of the weights in the engine's memory, by tensor
    forcing       tokens that a request asks for, in place of those that would be sampled
    kv_precision  measures how finely the KV cache holds its values
    numbering     numbers of the generations and requests that have the same nonce
    secrets       the control process's secrets, as this process knows them
    weights       a fingerprint of the weights that the engine loads
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "LogitsProcessor":
        from hemostat_engine.processor import LogitsProcessor  # noqa: PLC0415 - torch and vLLM only on demand

        return LogitsProcessor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
