"""A client's request, whatever its form: the structures that its body is read into.

mypyc cannot compile a `msgspec.Struct`, and makes a frozen dataclass slowly, attribute by attribute. So the structures
are here, and what reads and uses them is in modules that are compiled.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from hemostat.metrics.reasons import Unscored
from hemostat.openai.json_splice import NULL, JsonObject
from hemostat.openai.routes import Form


class Uncalibrated(StrEnum):
    """The reason why no profile may be applied to a request that can be scored: values of the label `reason` of
    calibration requests.
    """

    OWN_LOGITS = "own_logits"
    """The client changes logits itself (logit_bias, penalties). A profile was measured on unchanged logits, and engines
    differ in which change they apply first."""
    OWN_XARGS = "own_xargs"
    """The client itself names a profile in `vllm_xargs.hemostat`."""


FROM_TAP = frozenset(
    {
        Unscored.N,
        Unscored.ECHO,
        Unscored.CLIENT_LOGPROBS,
        Unscored.HIDDEN_REASONING,
        Unscored.NO_TOKEN_IDS,
    }
)
"""The requests whose response has to stay as it is, and that can be scored from what the engine's plugin reports."""
MAX_CHOICES = 16
"""The largest number of choices of one request that are recorded."""


class Message(msgspec.Struct):
    """One message of a chat; content: JSON, a string or a list of parts."""

    role: str = ""
    content: msgspec.Raw = msgspec.Raw(NULL)


class Part(msgspec.Struct):
    """One part of a message's content."""

    type: str = ""


class StreamOptions(msgspec.Struct):
    """The value of `stream_options`."""

    include_usage: bool | None = None


class RequestedLogprobs(msgspec.Struct, frozen=True):
    """The details of tokens that the client itself asks for. It gets exactly these."""

    token_ids: bool = False
    logprobs: bool = False
    top: int = 0
    """The number of alternatives at each position: 0, or 1, which is the emitted token."""
    as_ids: bool = False
    """It is True if tokens are named by their ids (`token_id:5`), not by their texts."""
    restorable: bool = True
    """If it is False, a response with other logprobs cannot be turned back into that."""


NO_LOGPROBS = RequestedLogprobs()
"""The client asks for no logprobs and no ids."""


class Request(msgspec.Struct, frozen=True):
    """The parts of a client's body that Hemostat decides by."""

    form: Form
    body: JsonObject
    model: str
    """The served name; "" if that is not known."""
    stream: bool
    usage_requested: bool
    """It is True if the client itself asked for usage in the stream."""
    tools: bool
    unscorable: Unscored | None
    """The reason why its tokens cannot be scored; None if they can."""
    uncalibrated: Uncalibrated | Unscored | None
    """The reason why no profile may be applied to it; None if one may."""
    client_profile: str | None
    """The version of the profile that the client itself named in `vllm_xargs`."""
    client_acts: bool
    """It is True if the client itself set a key of `vllm_xargs` that only Hemostat may use: it is removed."""
    conversation_key: bytes | None
    """A key that is equal for every turn of one conversation; it is the prompt's if no conversation can be recognized;
    None without a prompt."""
    messages: list[Message] | None
    """The messages of a chat."""
    min_prompt_tokens: int
    """A lower bound on the number of tokens of the longest prompt; 0 where only the engine knows it."""
    choices: int = 1
    """The number of choices of all prompts together."""
    prompts: int = 1
    requested: RequestedLogprobs = NO_LOGPROBS
    grammar: bool = False
    """It is True if a grammar restricts the tokens."""
    ids_only: bool = False
    """It is True if the request cannot be scored from its response alone, but the response can name the ids of its
    tokens: the engine then computes their log-probabilities again.
    """

    @property
    def from_tap(self) -> bool:
        """It is True if the request cannot be scored from its response, but can be from what the engine's plugin
        reports of it.
        """
        return self.unscorable in FROM_TAP and self.choices <= MAX_CHOICES
