"""The messages of passive mode, in which the plugin in vLLM's API server samples requests itself, without a relay.

The control process answers the plugin's messages with a `PassivePolicy`, and gets a `PassiveRequest` with each answer.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

Text = Annotated[str, msgspec.Meta(max_length=256)]
Count = Annotated[int, msgspec.Meta(ge=0, le=10**12)]

ROUTES = {
    "chatcmpl-": "/v1/chat/completions",
    "cmpl-": "/v1/completions",
    "resp_": "/v1/responses",
}
"""The route of a request by the beginning of the id that vLLM's server gives it. `/v1/messages` is served as a chat."""


class PassivePolicy(msgspec.Struct, frozen=True):
    """The rules by which the plugin samples requests. Without a policy it samples none."""

    rate: float
    """The fraction of requests that is sampled."""
    allow_on: bool
    """It is True if clients may force sampling by `X-Hemostat-Shadow: on`."""
    top_k: int
    """The number of most likely ids at each position."""
    max_tokens: int
    """The longest prompt and output together."""
    tap: bool
    """It is True if the logits processor reports features and masks of sampled requests."""
    grammars: bool
    """It is True if requests whose tokens a grammar restricts can be scored."""
    labels: frozenset[str]
    salt: bytes
    """The secret of the store, with which clients are hashed."""
    client_header: str
    """The lower-case name of the header that names the client."""


class PassiveRequest(msgspec.Struct, frozen=True):
    """The parts of a sampled request that decide how its answer is scored and counted."""

    route: Text
    request_id: Text
    model: Text
    label: Text = ""
    client: Annotated[bytes, msgspec.Meta(max_length=64)] = b""
    """A salted digest of the header that names the client; empty if it is not known."""
    stream: bool = False
    grammar: bool = False
    temperature: float = float("nan")
    """It is NaN if the distribution that tokens are drawn from is not known."""
    top_p: float = 1.0
    sampling_top_k: int = 0
    min_p: float = 0.0
    max_tokens: Count = 0
    """The largest number of generated tokens; 0 if it is not limited."""


class PassiveCounts(msgspec.Struct, frozen=True):
    """The counts of one process of vLLM's API server since its start."""

    requests: Annotated[dict[Text, Count], msgspec.Meta(max_length=16)]
    """The number of requests by route, sampled or not."""
    sampled: Count
    """The number of choices that were handed on."""
    unscored: Annotated[dict[Text, Count], msgspec.Meta(max_length=64)]
    """The number of sampled requests that were not handed on, by reason."""
    headers: bool
    """It is True if the middleware for clients' headers is in force."""


def route_of(request_id: str) -> str:
    """Returns the route of a request by its id in vLLM; "" if it is not one whose requests are sampled.

    >>> route_of("cmpl-1-0"), route_of("chatcmpl-1"), route_of("generate-tokens-1")
    ('/v1/completions', '/v1/chat/completions', '')
    """
    return next((route for prefix, route in ROUTES.items() if request_id.startswith(prefix)), "")
