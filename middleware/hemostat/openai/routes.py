"""The one table of the routes that vLLM serves: what Hemostat does with each, and how metrics and traces name it.

The routes by which LoRA adapters are loaded and unloaded are not in the table: the relay refuses them to clients. vLLM
serves them where VLLM_ALLOW_RUNTIME_LORA_UPDATING is set, which adapters of Hemostat's need: there anybody who reaches
the port could replace an adapter, or load one from any path of the server. In vLLM 0.32
(`entrypoints/serve/lora/api_router.py`) they are POST /v1/load_lora_adapter, POST /v1/unload_lora_adapter, and
SageMaker's names for the two, POST /adapters and DELETE /adapters/NAME.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Final
from urllib.parse import unquote_to_bytes


class Form(StrEnum):
    """The form in which a route writes its requests and responses. The value begins the names of its kinds of
    traffic.
    """

    CHAT = "chat"
    COMPLETIONS = "completions"
    RESPONSES = "responses"
    MESSAGES = "messages"


CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
RESPONSES: Final = "/v1/responses"
MESSAGES: Final = "/v1/messages"
MODELS: Final = "/v1/models"

OTHER: Final = "other"
"""The label of every route that has none of its own, so that the number of label values is bounded."""


class Support(Enum):
    """The ways in which Hemostat treats the requests of a route."""

    SCORED = "scored"
    """Requests can be sampled, scored and calibrated, and their outcomes are counted."""
    NOT_SCORED = "not_scored"
    """Requests generate or compute, too: a sampled one is counted as skipped, with the reason `route`."""
    RELAYED = "relayed"
    """Requests are relayed, and never sampled."""


@dataclass(frozen=True, slots=True)
class Route:
    """One path of vLLM's HTTP server."""

    path: str
    support: Support
    labelled: bool = True
    """It is True if the path is a value of the metrics' label `route`; otherwise that value is OTHER."""
    form: Form | None = None
    """The form of its requests, if they are scored."""
    operation: str = ""
    """The value of OpenTelemetry's attribute `gen_ai.operation.name`; "" if the route is not traced."""


ROUTES: Final = (
    Route(CHAT, Support.SCORED, form=Form.CHAT, operation="chat"),
    Route(COMPLETIONS, Support.SCORED, form=Form.COMPLETIONS, operation="text_completion"),
    Route(RESPONSES, Support.SCORED, form=Form.RESPONSES, operation="chat"),
    Route(MESSAGES, Support.SCORED, form=Form.MESSAGES, operation="chat"),
    Route("/v1/embeddings", Support.NOT_SCORED),
    Route(MODELS, Support.RELAYED),
    Route("/tokenize", Support.RELAYED),
    Route("/detokenize", Support.RELAYED),
    Route("/inference/v1/generate", Support.NOT_SCORED),
    Route("/version", Support.RELAYED),
    Route("/health", Support.RELAYED),
    Route("/ping", Support.RELAYED),
    Route("/metrics", Support.RELAYED),
    Route("/v1/chat/completions/batch", Support.NOT_SCORED, labelled=False),
    Route("/v1/audio/transcriptions", Support.NOT_SCORED, labelled=False),
    Route("/v1/audio/translations", Support.NOT_SCORED, labelled=False),
)

SCORED: Final[tuple[str, ...]] = tuple(route.path for route in ROUTES if route.support is Support.SCORED)
"""The paths whose requests can be sampled, scored and calibrated."""

FORMS: Final[dict[str, Form]] = {route.path: route.form for route in ROUTES if route.form is not None}
"""The path of a scored route -> the form of its requests."""

LABELS: Final[dict[bytes, str]] = {route.path.encode(): route.path for route in ROUTES if route.labelled}
"""A request's path, as bytes -> its label in metrics; use OTHER for every other path."""

REPEATABLE: Final[frozenset[str]] = frozenset(LABELS.values()) - {RESPONSES}
"""The labels of the routes whose requests may be sent again, POST too: vLLM computes an answer and keeps nothing. Of
`/v1/responses` it may keep the response."""

SUPPORT: Final[dict[bytes, Support]] = {route.path.encode(): route.support for route in ROUTES}
"""A request's path, as bytes -> what Hemostat does with it."""

OPERATIONS: Final[dict[str, str]] = {route.path: route.operation for route in ROUTES if route.operation}
"""The path of a traced route -> its `gen_ai.operation.name`."""

ADAPTER_ROUTE_REFUSED = (
    "Adapters cannot be loaded or unloaded through Hemostat. Use the vLLM server itself, or set "
    "upstream.allow_adapter_routes: true."
)
_ADAPTER_SEGMENTS = frozenset((b"load_lora_adapter", b"unload_lora_adapter", b"adapters"))
_separator = re.compile(rb"[/\\?#]")
_MAX_DECODED = 4
"""The largest number of times that a target is decoded: every proxy between Hemostat and vLLM may do so once."""


def loads_adapters(target: bytes) -> bool:
    """Returns True if a request's target (in origin form) may reach a route by which adapters are loaded or unloaded.

    The path is compared by its segments, in any place (vLLM's --root-path), any case, with percent-encoding, doubled
    slashes, dots or a fragment: what a server or a proxy may normalize must not get around this.
    """
    path = target.partition(b"?")[0].partition(b"#")[0]
    for _ in range(_MAX_DECODED):
        if b"%" not in path:
            break
        path = unquote_to_bytes(path)
    return not _ADAPTER_SEGMENTS.isdisjoint(_separator.split(path.lower()))
