"""Whole answers of tapped requests, recorded in the process of vLLM's API server.

A logits processor does not see what is sampled from its logits, and some of vLLM's routes return neither token ids nor
log-probabilities. `AsyncLLM.generate` yields both, for every route and both model runners. It is therefore wrapped, in
the process that loads the logits processor's class to check parameters (vLLM does so when the API server starts). Only
a request with `hemostat_tap_top` is changed: a copy of its parameters asks for logprobs, which are recorded and removed
before the server sees them, so that its response is the same.

Whatever goes wrong here is counted and affects no request.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
import sys
import threading
import uuid
from array import array
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable
from typing import Any

from hemostat_engine import xargs
from hemostat_engine.answer_sender import AnswerSender
from hemostat_engine.peers import Peers
from hemostat_engine.settings import Settings

log = logging.getLogger("vllm.hemostat")

ENGINE_MODULE = "vllm.v1.engine.async_llm"
MAX_QUEUE_BYTES = 64 << 20
MAX_ANSWER_BYTES = 12 << 20
"""Of one choice; a longer one is dropped. The admin port accepts messages of 16 MiB."""
MAX_CHOICES = 1 << 14
MAX_NONCES = 4096
"""Nonces whose generations are numbered; the oldest is forgotten."""

_PARAMETERS = ("self", "prompt", "sampling_params", "request_id")
_WRAPPED = "_hemostat_wrapped"


class AnswerQueue:
    """A bounded queue of finished answers, between the server's event loop and the sender's thread.

    count of `dropped` answers: there was no room, they could not be recorded, or not be sent.
    """

    def __init__(self, max_bytes: int = MAX_QUEUE_BYTES) -> None:
        self._answers: deque[dict[str, Any]] = deque()
        self._max_bytes = max_bytes
        self._bytes = 0
        self._lock = threading.Lock()
        self.dropped = 0
        self.filled = threading.Event()

    def push(self, answer: dict[str, Any]) -> None:
        size = answer_bytes(answer)
        with self._lock:
            if self._bytes + size > self._max_bytes:
                self.dropped += 1
                return
            self._bytes += size
            self._answers.append(answer)
        self.filled.set()

    def take(self, max_bytes: int) -> list[dict[str, Any]]:
        """The oldest answers: one, and as many more as stay within `max_bytes`."""
        taken: list[dict[str, Any]] = []
        size = 0
        with self._lock:
            while self._answers and (not taken or size + answer_bytes(self._answers[0]) <= max_bytes):
                taken.append(self._answers.popleft())
                size += answer_bytes(taken[-1])
            self._bytes -= size
            if not self._answers:
                self.filled.clear()
        return taken

    def drop(self, answers: int = 1) -> None:
        """Count answers that are lost."""
        with self._lock:
            self.dropped += answers


def answer_bytes(answer: dict[str, Any]) -> int:
    """The bytes of an answer's arrays."""
    return sum(len(value) for value in answer.values() if isinstance(value, bytes))


class _Choice:
    """What is recorded of one choice. Arrays as in the message: see `Recording.message`."""

    __slots__ = ("candidate_ids", "candidate_logprobs", "emitted_logprobs", "token_ids")

    def __init__(self) -> None:
        self.token_ids: array[int] = array("i")
        self.candidate_ids: array[int] = array("i")
        self.candidate_logprobs: array[float] = array("f")
        self.emitted_logprobs: array[float] = array("f")

    def add(self, ids: list[int], logprobs: Any, top_k: int) -> None:
        """Append positions. ValueError where ids and logprobs do not fit each other."""
        if logprobs is None or len(logprobs) != len(ids):
            raise ValueError("ids without their logprobs")
        for position, emitted in enumerate(ids):
            self._add_row(emitted, *_candidates(logprobs, position), top_k)
        self.token_ids.extend(ids)

    def _add_row(self, emitted: int, ids: list[int], logprobs: list[float], top_k: int) -> None:
        # vLLM lists the emitted id first, and again among the most likely ones.
        by_id = dict(zip(ids, logprobs, strict=True))
        if emitted not in by_id:
            raise ValueError("the logprobs do not have the emitted id")
        kept = [(value, i) for i, value in by_id.items() if i == emitted or value > -float("inf")]
        kept.sort(key=lambda pair: -pair[0])
        pad = top_k + 1 - len(kept)
        if pad < 0:
            raise ValueError("more candidates than were asked for")
        self.candidate_ids.extend([i for _, i in kept] + pad * [-1])
        self.candidate_logprobs.extend([value for value, _ in kept] + pad * [-float("inf")])
        self.emitted_logprobs.append(by_id[emitted])


def _candidates(logprobs: Any, position: int) -> tuple[list[int], list[float]]:
    """Ids and log-probabilities at one position of vLLM's FlatLogprobs, or of its list of dicts."""
    if hasattr(logprobs, "start_indices"):
        span = slice(logprobs.start_indices[position], logprobs.end_indices[position])
        return logprobs.token_ids[span], logprobs.logprobs[span]
    row = logprobs[position]
    return list(row), [entry.logprob for entry in row.values()]


def _shortened(logprobs: Any, ids: Any, top_k: int) -> Any:
    """vLLM's list of dicts as it is where `top_k` candidates are asked for, beside the emitted id."""
    if hasattr(logprobs, "start_indices"):
        # The emitted id stands first, then the most likely ones.
        shorter = type(logprobs)()
        for start, end in zip(logprobs.start_indices, logprobs.end_indices, strict=True):
            span = slice(start, min(end, start + 1 + top_k))
            fields = (logprobs.token_ids, logprobs.logprobs, logprobs.ranks, logprobs.decoded_tokens)
            shorter.append_fast(*(values[span] for values in fields))
        return shorter
    return [
        {i: entry for i, entry in row.items() if i == emitted or entry.rank <= top_k}
        for row, emitted in zip(logprobs, ids, strict=True)
    ]


class Recording:
    """One generation. `params` are what the engine is asked for, `note` takes what it yields."""

    def __init__(self, queue: AnswerQueue, nonce: str, call: int, params: Any, max_logprobs: int, top: int) -> None:
        """params: the request's own. max_logprobs: the server's limit, -1 for none. top: what was asked for."""
        self._queue = queue
        self._nonce = nonce
        self._call = call
        self._number = int(params.n or 1)
        self._choices: dict[int, _Choice] = {}
        self._failed = False
        self._own: int | None = params.logprobs
        """What the server itself asked for, and gets."""
        self.top_k = max(self._own or 0, top if max_logprobs < 0 else min(top, max_logprobs))
        self.params = copy.copy(params)
        self.params.logprobs = self.top_k
        if self._own is None:
            self.params.flat_logprobs = True

    def note(self, output: Any) -> None:
        """Record one RequestOutput, and remove from it what the server did not ask for. Never raises."""
        try:
            if not self._failed:
                self._record(output)
        except Exception as error:  # noqa: BLE001 - the client's response must not depend on it
            self._fail()
            log.warning("an answer was not recorded: %s: %s", type(error).__name__, error)
        for completion in output.outputs:
            if self._own is None:
                completion.logprobs = completion.cumulative_logprob = None
            elif self._own < self.top_k and completion.logprobs is not None:
                completion.logprobs = _shortened(completion.logprobs, completion.token_ids, self._own)

    def _record(self, output: Any) -> None:
        for completion in output.outputs:
            choice = self._choices.setdefault(completion.index, _Choice())
            choice.add(list(completion.token_ids), completion.logprobs, self.top_k)
            if (8 * self.top_k + 20) * len(choice.token_ids) + 4 * len(output.prompt_token_ids) > MAX_ANSWER_BYTES:
                self._fail()
                return
            if completion.finish_reason is not None:
                del self._choices[completion.index]
                self._queue.push(self._message(completion, choice, output.prompt_token_ids))

    def _fail(self) -> None:
        self._failed = True
        self._choices.clear()
        self._queue.drop()

    def _message(self, completion: Any, choice: _Choice, prompt_ids: list[int]) -> dict[str, Any]:
        """Little-endian arrays: int32 ids, float32 nats; candidates [T, top_k + 1], most likely first, padded with -1
        and -inf, the emitted id among them."""
        return {
            "nonce": self._nonce,
            "call": self._call,
            "choice": completion.index,
            "choices": self._number,
            "prompt_ids": _little_endian(array("i", prompt_ids)),
            "token_ids": _little_endian(choice.token_ids),
            "top_k": self.top_k,
            "candidate_ids": _little_endian(choice.candidate_ids),
            "candidate_logprobs": _little_endian(choice.candidate_logprobs),
            "emitted_logprobs": _little_endian(choice.emitted_logprobs),
            "finish_reason": str(completion.finish_reason)[:64],
        }


def _little_endian(values: array[Any]) -> bytes:
    if sys.byteorder == "big":
        values = values[:]
        values.byteswap()
    return values.tobytes()


class AnswerTap:
    """Decides which generations are recorded. `start_sender`: called once, before the first is."""

    def __init__(self, queue: AnswerQueue, start_sender: Callable[[], None]) -> None:
        self._queue = queue
        self._start_sender = start_sender
        self._started = False
        self._calls: OrderedDict[str, int] = OrderedDict()

    def begin(self, engine: Any, prompt: Any, params: Any) -> Recording | None:
        """A recording, if the request asks for one. Never raises."""
        extra = getattr(params, "extra_args", None)
        if not extra or xargs.TOP_KEY not in extra:
            return None
        try:
            return self._begin(engine, prompt, params)
        except ValueError:
            return None  # vLLM refuses the request when it validates its parameters
        except Exception as error:  # noqa: BLE001 - the request must not depend on it
            self._queue.drop()
            log.warning("an answer cannot be recorded: %s: %s", type(error).__name__, error)
            return None

    def _begin(self, engine: Any, prompt: Any, params: Any) -> Recording | None:
        asked = xargs.parse(params.extra_args)
        if asked.nonce is None or asked.top is None or hasattr(prompt, "__aiter__"):
            return None
        own = params.logprobs
        # Ids that the client chooses, or all of the vocabulary, are not the most likely ones.
        chosen = getattr(params, "logprob_token_ids", None)
        known_kind = params.output_kind.name in ("DELTA", "FINAL_ONLY")
        if chosen or not known_kind or (own is not None and not 0 <= own <= xargs.MAX_TOP):
            self._queue.drop()
            return None
        if not self._started:
            self._started = True
            self._start_sender()
        call = self._calls.pop(asked.nonce, 0)
        self._calls[asked.nonce] = call + 1
        if len(self._calls) > MAX_NONCES:
            self._calls.popitem(last=False)
        return Recording(self._queue, asked.nonce, call, params, engine.model_config.max_logprobs, asked.top)


def install() -> None:
    """Wrap `AsyncLLM.generate` in a process that has imported it; else, and without an admin port, do nothing.

    Idempotent; never raises.
    """
    module = sys.modules.get(ENGINE_MODULE)
    engine_class = getattr(module, "AsyncLLM", None)
    if engine_class is None or _WRAPPED in vars(engine_class):
        return
    try:
        settings = Settings.from_environment()
        if settings.admin_url is None:
            return
        generate = engine_class.generate
        if not inspect.isasyncgenfunction(generate) or tuple(inspect.signature(generate).parameters)[:4] != _PARAMETERS:
            log.warning("answers are not handed out: this vLLM's AsyncLLM.generate is not the known one")
            return
        queue = AnswerQueue()
        sender = AnswerSender(queue, Peers(settings), uuid.uuid4().hex)
        engine_class.generate = wrapped(generate, AnswerTap(queue, sender.start))
        setattr(engine_class, _WRAPPED, True)
    except Exception as error:  # noqa: BLE001 - vLLM must start whatever happens here
        log.warning("answers are not handed out: %s: %s", type(error).__name__, error)


def wrapped(generate: Callable[..., AsyncGenerator[Any, None]], tap: AnswerTap) -> Callable[..., Any]:
    """`generate` with the tap: the same generator for a request that is not recorded."""

    @functools.wraps(generate)
    def tapped(engine: Any, prompt: Any, sampling_params: Any, *arguments: Any, **named: Any) -> Any:
        recording = tap.begin(engine, prompt, sampling_params)
        if recording is None:
            return generate(engine, prompt, sampling_params, *arguments, **named)
        return _recorded(generate(engine, prompt, recording.params, *arguments, **named), recording)

    return tapped


async def _recorded(outputs: AsyncGenerator[Any, None], recording: Recording) -> AsyncGenerator[Any, None]:
    # The engine aborts a request when its generator is closed.
    async with contextlib.aclosing(outputs):
        async for output in outputs:
            recording.note(output)
            yield output
