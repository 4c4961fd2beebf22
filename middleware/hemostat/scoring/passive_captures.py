"""Captures of requests that the plugin in vLLM's API server has sampled: it sees ids and sampling parameters only.

- A request's kind has fewer parts than behind a relay: the texts are not looked at, so that `json`, `tools`, `code`,
  a script and `reply` are not told apart from `text`.
- A conversation is recognized by its prompts: each turn's prompt begins with the prompt of the turn before it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from hashlib import blake2b

import msgspec

from hemostat.engines.messages import TapAnswer
from hemostat.ipc.messages import ID_BYTES, Capture
from hemostat.openai.kinds import BRIEF_TOKENS, GRAMMAR_PART, LONG_TOKENS, MAX_NAME_CHARACTERS
from hemostat.openai.routes import FORMS, Form
from hemostat.scoring.intake import shortened
from hemostat_calibration.passive import PassiveRequest
from hemostat_calibration.records import Arm

MIN_PREFIX_TOKENS = 16
"""A shorter prompt begins no conversation: it is only compared as a whole."""
MAX_PROMPTS = 1024
"""The number of prompts that are remembered, the last ones."""
_DIGEST_BYTES = 16
_PERSON = b"hemostat talk"


class Conversations:
    """Names conversations by their prompts' ids, as salted digests; the ids are not kept.

    >>> turns = Conversations()
    >>> first = turns.assign(bytes(4 * 20), b"salt")
    >>> turns.assign(bytes(4 * 20) + b"next", b"salt") == first, turns.assign(bytes(4 * 19), b"salt") == first
    (True, False)
    """

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[int, bytes], bytes] = OrderedDict()
        """The conversation of each prompt, by its length in bytes and its digest."""
        self._lengths: Counter[int] = Counter()

    def assign(self, prompt: bytes, salt: bytes) -> bytes:
        """Returns the conversation of the longest earlier prompt with which this one begins. prompt: int32 ids."""
        digest, at, result = blake2b(digest_size=_DIGEST_BYTES, key=salt, person=_PERSON), 0, b""
        for length in sorted(length for length in self._lengths if length <= len(prompt)):
            digest.update(prompt[at:length])
            at = length
            result = self._known.get((length, digest.copy().digest()), result)
        digest.update(prompt[at:])
        whole = digest.digest()
        result = result or whole
        if len(prompt) >= MIN_PREFIX_TOKENS * ID_BYTES:
            self._remember((len(prompt), whole), result)
        return result

    def _remember(self, key: tuple[int, bytes], conversation: bytes) -> None:
        if self._known.pop(key, None) is None:
            self._lengths[key[0]] += 1
        self._known[key] = conversation
        if len(self._known) > MAX_PROMPTS:
            (length, _), _ = self._known.popitem(last=False)
            self._lengths[length] -= 1
            if not self._lengths[length]:
                del self._lengths[length]


class PassiveCaptures:
    """Makes captures, and hands them on. It lives in the control process's event loop.

    offer: takes a capture. salt: of the store. top_k: `shadow.top_k`. tapped: returns True if the logits processor
    reports. several_models: returns True if more than one model can be scored. engine: returns the address of the only
    engine, else "". clock: monotonic seconds.
    """

    def __init__(
        self,
        offer: Callable[[Capture], None],
        *,
        salt: Callable[[], bytes],
        top_k: Callable[[], int],
        tapped: Callable[[], bool],
        several_models: Callable[[], bool],
        engine: Callable[[], str],
        clock: Callable[[], float],
    ) -> None:
        self._offer = offer
        self._salt = salt
        self._top_k = top_k
        self._tapped = tapped
        self._several_models = several_models
        self._engine = engine
        self._clock = clock
        self._conversations = Conversations()

    def update(self, answer: TapAnswer) -> None:
        """Takes a choice that a plugin has sampled."""
        request = answer.request
        if request is None or request.route not in FORMS or not answer.tokens or not answer.prompt_ids:
            return
        answer = shortened(answer, self._top_k())
        self._offer(
            Capture(
                request_id=request.request_id,
                route=request.route,
                model=request.model,
                label=request.label,
                arm=Arm.NONE.value,
                requested=None,
                nonce=answer.nonce if self._tapped() else "",
                stream=request.stream,
                prompt_token_ids=answer.prompt_ids,
                output_token_ids=answer.token_ids,
                top_k=answer.top_k,
                candidate_ids=answer.candidate_ids,
                candidate_logprobs=answer.candidate_logprobs,
                emitted_logprobs=answer.emitted_logprobs,
                temperature=request.temperature,
                top_p=request.top_p,
                sampling_top_k=request.sampling_top_k,
                min_p=request.min_p,
                finish_reason=answer.finish_reason,
                captured_at=self._clock(),
                kind=kind_of(request, len(answer.prompt_ids) // ID_BYTES, several_models=self._several_models()),
                conversation=self._conversations.assign(answer.prompt_ids, self._salt()),
                client=request.client,
                choice=answer.choice,
                choices=answer.choices,
                grammar=request.grammar,
                engine=self._engine(),
                generated=answer.tokens if answer.choices == 1 else -1,
                decoding=decoding_of(request),
            )
        )


def kind_of(request: PassiveRequest, prompt_tokens: int, *, several_models: bool) -> str:
    """Returns the full name of the request's kind (`hemostat.openai.kinds`).

    >>> kind_of(PassiveRequest("/v1/completions", "", "m", temperature=0.0, max_tokens=8), 3, several_models=False)
    'completions text greedy brief'
    """
    parts = [FORMS[request.route].value]
    if several_models:
        parts.append("model " + "_".join(request.model.split())[:MAX_NAME_CHARACTERS])
    if request.label:
        parts.append(f"label {request.label}")
    parts.append(GRAMMAR_PART if request.grammar else "text")
    cut = request.top_p < 1.0 or request.sampling_top_k > 0 or request.min_p > 0.0
    parts.append("greedy" if request.temperature == 0.0 else "cut" if cut else "sampled")
    if prompt_tokens > LONG_TOKENS:
        parts.append("long")
    if 0 < request.max_tokens <= BRIEF_TOKENS:
        parts.append("brief")
    return " ".join(parts)


def decoding_of(request: PassiveRequest) -> bytes:
    """Returns the decoding parameters as a JSON object, so that another model can be asked the same; b"" if the request
    has others, too."""
    if request.temperature != request.temperature:
        return b""
    limit = "max_output_tokens" if FORMS[request.route] is Form.RESPONSES else "max_tokens"
    given = {"temperature": request.temperature, "top_p": request.top_p, "top_k": request.sampling_top_k}
    given |= {"min_p": request.min_p, limit: request.max_tokens}
    return msgspec.json.encode({key: value for key, value in given.items() if key != limit or value})
