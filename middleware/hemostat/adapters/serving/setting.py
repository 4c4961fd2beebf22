"""The arguments that vLLM has to be started with to serve adapters, and the meaning of a refusal for them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from hemostat.adapters.serving.slots import rank_setting
from hemostat.reference.protocol import FailureReason, ReferenceFailure
from hemostat.reference.server import Refused
from hemostat_calibration.messages import in_words

UPDATING = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
PLUGIN = "HEMOSTAT_ADAPTERS=1"


class Way(StrEnum):
    """The way in which an adapter gets to the engine."""

    RESOLVER = "resolver"
    """Hemostat's general plugin fetches it from the admin port."""
    FOLDER = "folder"
    """The engine reads it from `adapter.folder`."""


def flags(rank: int) -> str:
    """Returns vLLM's arguments for one adapter at a time, of at most this rank, and a free slot.

    >>> flags(20)
    '--enable-lora --max-loras 2 --max-lora-rank 32'
    """
    return f"--enable-lora --max-loras 2 --max-lora-rank {rank_setting(rank)}"


def without_lora(rank: int) -> str:
    """Returns the fix for a vLLM that was started without --enable-lora, in one line.

    >>> without_lora(20)
    'LoRA is not enabled: start vLLM with --enable-lora --max-loras 2 --max-lora-rank 32'
    """
    return f"LoRA is not enabled: start vLLM with {flags(rank)}"


def explain(failure: Exception, rank: int, way: Way | None, folder: Path | None) -> str:
    """Returns why an adapter of this rank could not be loaded, and the fix, in one line.

    way: the way in which adapters were loaded so far. folder: `adapter.folder`.
    """
    started = f"start vLLM with {flags(rank)}"
    if isinstance(failure, Refused):
        text = failure.detail
        if "is greater than max_lora_rank" in text:
            return f"{text.rstrip('.')}: set --max-lora-rank {rank_setting(rank)}"
        if "not enabled" in text:
            return without_lora(rank)
        if "could not be loaded" in text:
            return f"the engine refused it: {started}, where it was started with less; vLLM's log has the reason"
        if "No adapter found" in text:
            return "the engine does not see adapter.folder: mount it there at the same path"
        if failure.status == 404 and way is Way.RESOLVER:
            return "the engine could not fetch it: check its HEMOSTAT_ADMIN_URL and HEMOSTAT_ENGINE_TOKEN, and its log"
        if failure.status == 404 and folder is not None:
            return f"the upstream has no route to load it: {started} and the environment {UPDATING}"
        if failure.status == 404:
            plugin = f"{UPDATING} {PLUGIN}, or set adapter.folder"
            return f"the upstream loads no adapters: {started} and the environment {plugin}"
    if isinstance(failure, ReferenceFailure) and failure.reason is FailureReason.UNAUTHORIZED:
        return f"{failure}; set upstream.api_key"
    if isinstance(failure, OSError):
        return f"adapter.folder: {folder}: {in_words(failure)}"
    return str(failure)
