"""The one table of the routes that vLLM serves: what Hemostat does with each, and how metrics and traces name it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from hemostat.openai.form import Form

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
