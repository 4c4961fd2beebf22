"""The tokens of one response, choice by choice, and why they could not be recorded."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

from hemostat.metrics.reasons import Unscored
from hemostat.openai.json_splice import MALFORMED
from hemostat.openai.logprobs.rows import Rows, read_rows
from hemostat.openai.routes import Form

MAX_UNPARSED_BYTES = 512 * 1024
"""The largest size of one choice's `logprobs` that are held unparsed: about the JSON of 200 tokens with 20
alternatives. When more is held it is parsed, which makes it twelve times smaller; what is shorter is parsed where it is
scored.
"""


_OVERLOAD = (408, 425, 429)


def status_failure(status: int) -> Unscored:
    """Returns the reason that an error in answer to the client's own request counts as."""
    refused = 400 <= status < 500 and status not in _OVERLOAD
    return Unscored.REQUEST_REFUSED if refused else Unscored.UPSTREAM_ERROR


def error_reason(data: bytes) -> Unscored:
    """Returns the reason that an error counts as, by its text in a body or in a stream's event."""
    return Unscored.LOGPROBS_REFUSED if b"sample logprobs" in data else Unscored.UPSTREAM_ERROR


TokenCount = Annotated[int, msgspec.Meta(ge=0, le=10**9)]
"""A number of tokens in a response's usage. It is added to counters, where a negative or an absurd one would stay."""


class Usage(msgspec.Struct):
    """The usage of all choices together; `prompt_tokens` counts each prompt once."""

    prompt_tokens: TokenCount
    completion_tokens: TokenCount


usage_decoder: msgspec.json.Decoder[Usage] = msgspec.json.Decoder(Usage)
_ids: msgspec.json.Decoder[list[int]] = msgspec.json.Decoder(list[int])


@dataclass(slots=True)
class ChoiceTokens:
    """The tokens of one choice, with T output positions."""

    prompt_ids: array[int] = field(default_factory=lambda: array("i"))
    output_ids: array[int] = field(default_factory=lambda: array("i"))
    """The emitted ids, [T]."""
    logprobs: list[bytes] = field(default_factory=list)
    """The JSON of `logprobs`, in pieces, of the positions that are not in `parsed`."""
    parsed: list[Rows] = field(default_factory=list)
    """The candidates of the first positions of a long output."""
    unparsed_bytes: int = 0
    """The bytes of `logprobs` that are not parsed."""
    finish_reason: str = ""
    reasoning: bool = False
    """It is True if vLLM's parser found reasoning in the choice."""

    def parse(self, form: Form, top_k: int) -> None:
        """Parses what is not parsed yet. Raises one of MALFORMED if it does not fit the ids."""
        first = sum(len(rows.emitted) for rows in self.parsed)
        self.parsed.append(read_rows(form, self.logprobs, self.output_ids[first:], top_k))
        self.logprobs = []
        self.unparsed_bytes = 0


@dataclass(slots=True)
class ResponseTokens:
    """The tokens of one response. No choice is left after a failure: one that is incomplete fails them all."""

    top_k: int
    """The number of candidates at each position. It is 0 if the response names ids only."""
    limit: int
    """The largest number of prompt and output tokens together, of one choice."""
    expected: int = 1
    """The number of choices of all prompts together."""
    prompts: int = 1
    form: Form = Form.CHAT
    failure: Unscored | None = None
    """The first failure, if any."""
    choices: list[ChoiceTokens] = field(init=False)
    model: str = ""
    usage: Usage | None = None
    usage_expected: bool = True
    """If it is False, the response does not contain it, since it was not requested."""

    def __post_init__(self) -> None:
        self.choices = [ChoiceTokens() for _ in range(self.expected)]

    def fail(self, reason: Unscored) -> None:
        """Drops the tokens and keeps the reason, unless an earlier failure did so."""
        if self.failure is None:
            self.failure = reason
            self.choices = []

    def choice(self, index: Any) -> ChoiceTokens:
        """Returns the choice of this index in the response. Raises ValueError if there is none."""
        if not isinstance(index, int) or not 0 <= index < len(self.choices):
            raise ValueError(f"no choice {index!r} among {len(self.choices)}")
        return self.choices[index]

    def add_prompt(self, index: int, raw: bytes) -> None:
        """Adds the ids (JSON) of the prompt of this choice."""
        choice = self.choice(index)
        choice.prompt_ids = array("i", _ids.decode(raw))
        if self._is_too_long(choice):
            self.fail(Unscored.TOO_LONG)

    def add(self, index: Any, ids: list[int], logprobs: bytes = b"") -> None:
        """Appends the positions of one event or response: their ids, and the JSON of their `logprobs`, if it has any.
        ValueError or OverflowError where there is no such choice or id."""
        choice = self.choice(index)
        choice.output_ids.extend(ids)
        if logprobs:
            choice.logprobs.append(logprobs)
        choice.unparsed_bytes += len(logprobs)
        if choice.unparsed_bytes > MAX_UNPARSED_BYTES:
            self._parse(choice)
        if self._is_too_long(choice):
            self.fail(Unscored.TOO_LONG)

    def _parse(self, choice: ChoiceTokens) -> None:
        try:
            choice.parse(self.form, self.top_k)
        except MALFORMED:
            self.fail(Unscored.NO_LOGPROBS)

    def _is_too_long(self, choice: ChoiceTokens) -> bool:
        return len(choice.prompt_ids) + len(choice.output_ids) > self.limit

    def _share_prompts(self) -> int:
        """Gives every choice its prompt, which not every one has to repeat; returns the number of prompt tokens."""
        each = self.expected // self.prompts
        total = 0
        for first in range(0, self.expected, each):
            group = self.choices[first : first + each]
            prompt = next((choice.prompt_ids for choice in group if choice.prompt_ids), group[0].prompt_ids)
            total += len(prompt)
            for choice in group:
                choice.prompt_ids = choice.prompt_ids or prompt
        return total

    def check_finished(self) -> None:
        """Checks a response for which no ids are expected: every choice has to say how it finished."""
        if self.failure is None and not all(choice.finish_reason for choice in self.choices):
            self.fail(Unscored.INCOMPLETE)

    def check_complete(self, tools: bool) -> None:
        """Compares the counts with the engine's own; `failure` is final then. tools: True if the request offered
        tools."""
        if self.failure is not None:
            return
        prompt_tokens = self._share_prompts()
        if any(self._is_too_long(choice) for choice in self.choices):
            self.fail(Unscored.TOO_LONG)
            return
        usage, generated = self.usage, sum(len(choice.output_ids) for choice in self.choices)
        if not all(choice.finish_reason for choice in self.choices) or (usage is None and self.usage_expected):
            self.fail(Unscored.INCOMPLETE)
        elif usage is not None and usage.completion_tokens != generated:
            self.fail(Unscored.TOOL_TOKENS_LOST if tools else Unscored.TOKEN_COUNT_MISMATCH)
        elif usage is not None and usage.prompt_tokens != prompt_tokens:
            self.fail(Unscored.TOKEN_COUNT_MISMATCH)
        elif not all(choice.output_ids for choice in self.choices):
            self.fail(Unscored.EMPTY)
        for choice in self.choices:
            if choice.parsed and choice.logprobs:
                self._parse(choice)
