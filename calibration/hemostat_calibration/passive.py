"""The messages of passive mode, in which the plugin in vLLM's API server samples requests itself, without a relay.

The control process answers the plugin's messages with a `PassivePolicy`, and gets a `PassiveRequest` with each answer.
"""

from __future__ import annotations

from dataclasses import dataclass

from hemostat_calibration.errors import InvalidArgumentError

MAX_TEXT = 256
MAX_CLIENT_BYTES = 64
MAX_COUNT = 10**12
MAX_ROUTES, MAX_REASONS = 16, 64

ROUTES = {
    "chatcmpl-": "/v1/chat/completions",
    "cmpl-": "/v1/completions",
    "resp_": "/v1/responses",
}
"""The route of a request by the beginning of the id that vLLM's server gives it. `/v1/messages` is served as a chat."""


@dataclass(frozen=True, slots=True)
class PassivePolicy:
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


@dataclass(frozen=True, slots=True)
class PassiveRequest:
    """The parts of a sampled request that decide how its answer is scored and counted. Raises InvalidArgumentError for
    a text, a digest or a number that is too long or too large."""

    route: str
    request_id: str
    model: str
    label: str = ""
    client: bytes = b""
    """A salted digest of the header that names the client; empty if it is not known."""
    stream: bool = False
    grammar: bool = False
    temperature: float = float("nan")
    """It is NaN if the distribution that tokens are drawn from is not known."""
    top_p: float = 1.0
    sampling_top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 0
    """The largest number of generated tokens; 0 if it is not limited."""

    def __post_init__(self) -> None:
        for name in ("route", "request_id", "model", "label"):
            _check_text(name, getattr(self, name))
        if len(self.client) > MAX_CLIENT_BYTES:
            raise InvalidArgumentError(f"client has {len(self.client)} bytes: at most {MAX_CLIENT_BYTES}")
        _check_count("max_tokens", self.max_tokens)


@dataclass(frozen=True, slots=True)
class PassiveCounts:
    """The counts of one process of vLLM's API server since its start. Raises InvalidArgumentError for a count that is
    out of range, and for more names than there can be."""

    requests: dict[str, int]
    """The number of requests by route, sampled or not."""
    sampled: int
    """The number of choices that were handed on."""
    unscored: dict[str, int]
    """The number of sampled requests that were not handed on, by reason."""
    headers: bool
    """It is True if the middleware for clients' headers is in force."""

    def __post_init__(self) -> None:
        _check_count("sampled", self.sampled)
        for name, counts, most in (
            ("requests", self.requests, MAX_ROUTES),
            ("unscored", self.unscored, MAX_REASONS),
        ):
            if len(counts) > most:
                raise InvalidArgumentError(f"{name} has {len(counts)} names: at most {most}")
            for key, count in counts.items():
                _check_text(name, key)
                _check_count(name, count)


def _check_text(name: str, text: str) -> None:
    if len(text) > MAX_TEXT:
        raise InvalidArgumentError(f"{name} has {len(text)} characters: at most {MAX_TEXT}")


def _check_count(name: str, count: int) -> None:
    if not 0 <= count <= MAX_COUNT:
        raise InvalidArgumentError(f"{name} is {count}: it must be from 0 to {MAX_COUNT}")


def route_of(request_id: str) -> str:
    """Returns the route of a request by its id in vLLM; "" if it is not one whose requests are sampled.

    >>> route_of("cmpl-1-0"), route_of("chatcmpl-1"), route_of("generate-tokens-1")
    ('/v1/completions', '/v1/chat/completions', '')
    """
    return next((route for prefix, route in ROUTES.items() if request_id.startswith(prefix)), "")
