"""Whole answers of sampled requests, recorded in the process of vLLM's API server.

A logits processor does not see what is sampled from its logits, and some of vLLM's routes return neither token ids nor
log-probabilities. `AsyncLLM.generate` yields both, for every route and both model runners. The general plugin therefore
wraps it as soon as vLLM imports its module (`watch`). Only a request that a relay has sampled (`hemostat_tap_top`), or
that is sampled here (`passive`), is changed: a copy of its parameters asks for logprobs, which are recorded and removed
before the server sees them, so that its response is the same.

Whatever goes wrong here is counted and affects no request.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import logging
import sys
import uuid
from array import array
from collections.abc import AsyncGenerator, Callable
from typing import Any

from hemostat_calibration.arrays import little_endian
from hemostat_calibration.engine_keys import CHECKSUMS_KEY, TAP_TOP_KEY, without_acting
from hemostat_calibration.passive import PassiveRequest
from hemostat_engine import checksums, xargs
from hemostat_engine.answer_sender import AnswerQueue, AnswerSender
from hemostat_engine.numbering import Numbering
from hemostat_engine.passive import Lost, PassiveSampler, Sampled
from hemostat_engine.peers import Peers
from hemostat_engine.secrets import Secrets
from hemostat_engine.settings import Settings

log = logging.getLogger("vllm.hemostat")

ENGINE_MODULE = "vllm.v1.engine.async_llm"
MAX_ANSWER_BYTES = 12 << 20
"""The largest size of one choice; a longer one is dropped. The admin port accepts messages of 16 MiB."""
MAX_ACTIVE = 128
"""The largest number of generations that are recorded at the same time; further ones are served without being
recorded."""

MAX_ACTIVE_BYTES = 64 << 20
"""The largest size of all choices that are being recorded, together. A recording that would need more is given up."""

_PARAMETERS = ("self", "prompt", "sampling_params", "request_id")
_WRAPPED = "_hemostat_wrapped"


class RecordedAnswer:
    """A choice that has ended. It is recorded in the server's event loop; `message` is for another thread."""

    __slots__ = ("_finish_reason", "_names", "_nonce", "_prompt_ids", "_request", "_rows", "_top_k", "bytes")

    def __init__(
        self,
        nonce: str,
        names: dict[str, int],
        top_k: int,
        rows: _Rows,
        prompt_ids: list[int],
        finish_reason: str,
        request: PassiveRequest | None = None,
    ) -> None:
        """names: the message's `call`, `choice` and `choices`. request: None if a relay has sampled the request."""
        self._request = request
        self._nonce = nonce
        self._top_k = top_k
        self._names = names
        self._rows = rows
        self._prompt_ids = array("i", prompt_ids)
        self._finish_reason = finish_reason
        self.bytes = _bytes(rows.tokens, top_k, len(prompt_ids))
        """The bytes of the message's arrays."""

    def message(self) -> dict[str, Any]:
        """Returns the message with little-endian arrays: int32 ids, float32 nats; candidates [T, top_k + 1], most
        likely first, padded with -1 and -inf, the emitted id among them. A listed id that a grammar's mask excludes has
        -inf, too. Raises ValueError if the logprobs of a position do not have the emitted id.
        """
        candidate_ids, candidate_logprobs, emitted_logprobs = self._rows.sorted(self._top_k)
        return {
            "nonce": self._nonce,
            **self._names,
            "prompt_ids": little_endian(self._prompt_ids),
            "token_ids": little_endian(self._rows.token_ids),
            "top_k": self._top_k,
            "candidate_ids": little_endian(candidate_ids),
            "candidate_logprobs": little_endian(candidate_logprobs),
            "emitted_logprobs": little_endian(emitted_logprobs),
            "finish_reason": self._finish_reason,
        } | ({} if self._request is None else {"request": self._request})


def _bytes(tokens: int, top_k: int, prompt_tokens: int) -> int:
    """Returns the bytes of a message's arrays. The arrays of `_Rows` have at most 4 bytes more per token."""
    return (8 * top_k + 16) * tokens + 4 * prompt_tokens


class _Rows:
    """The parts of one choice that vLLM yielded, as they came: T emitted ids, and the ids and log-probabilities of T
    positions.
    """

    __slots__ = ("_ends", "_ids", "_logprobs", "token_ids")

    def __init__(self) -> None:
        self.token_ids: array[int] = array("i")
        self._ids: array[int] = array("i")
        self._logprobs: array[float] = array("f")
        self._ends: array[int] = array("i")

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    def add(self, ids: list[int], logprobs: Any, top_k: int) -> None:
        """Appends positions. Raises ValueError if ids and logprobs do not fit each other, or there are too many."""
        if logprobs is None or len(logprobs) != len(ids):
            raise ValueError("ids without their logprobs")
        for position in range(len(ids)):
            row_ids, row_logprobs = _candidates(logprobs, position)
            if len(row_ids) > top_k + 1:
                raise ValueError("more candidates than were asked for")
            self._ids.extend(row_ids)
            self._logprobs.extend(row_logprobs)
            self._ends.append(len(self._ids))
        self.token_ids.extend(ids)

    def sorted(self, top_k: int) -> tuple[array[int], array[float], array[float]]:
        """Returns candidate ids, their log-probabilities, and the log-probabilities of the emitted ids; see
        `RecordedAnswer.message`.
        """
        candidate_ids, candidate_logprobs, emitted_logprobs = array("i"), array("f"), array("f")
        start = 0
        for emitted, end in zip(self.token_ids, self._ends, strict=True):
            # vLLM lists the emitted id first, and again among the most likely ones.
            by_id = dict(zip(self._ids[start:end], self._logprobs[start:end], strict=True))
            if emitted not in by_id:
                raise ValueError("the logprobs do not have the emitted id")
            row = sorted(by_id.items(), key=lambda pair: -pair[1])
            pad = top_k + 1 - len(row)
            candidate_ids.extend([i for i, _ in row] + pad * [-1])
            candidate_logprobs.extend([value for _, value in row] + pad * [-float("inf")])
            emitted_logprobs.append(by_id[emitted])
            start = end
        return candidate_ids, candidate_logprobs, emitted_logprobs


def _candidates(logprobs: Any, position: int) -> tuple[list[int], list[float]]:
    """Returns the ids and log-probabilities at one position of vLLM's FlatLogprobs, or of its list of dicts."""
    if hasattr(logprobs, "start_indices"):
        span = slice(logprobs.start_indices[position], logprobs.end_indices[position])
        return logprobs.token_ids[span], logprobs.logprobs[span]
    row = logprobs[position]
    return list(row), [entry.logprob for entry in row.values()]


def _shortened(logprobs: Any, ids: Any, top_k: int) -> Any:
    """Returns vLLM's list of dicts as it is if `top_k` candidates are asked for, in addition to the emitted id."""
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


class Room:
    """Counts the bytes of all recordings that are in progress. The server's event loop alone uses it."""

    def __init__(self, max_bytes: int = MAX_ACTIVE_BYTES) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0


class Recording:
    """One generation. `params` are what the engine is asked for, `update` takes what it yields, `end` what is left."""

    def __init__(
        self,
        queue: AnswerQueue,
        room: Room,
        nonce: str,
        call: int,
        params: Any,
        top: int,
        sampled: Sampled | None = None,
        sampler: PassiveSampler | None = None,
    ) -> None:
        """params: the request's own. top: the number of log-probabilities to record, within the server's limit.
        sampled: None if a relay has sampled the request. sampler: counts what becomes of it otherwise.
        """
        self._sampled = sampled
        self._sampler = sampler
        self._unfinished = True
        self._queue = queue
        self._room = room
        self._held = 0
        """The bytes of `room` that this recording has."""
        self._nonce = nonce
        self._call = call
        self._number = int(params.n or 1)
        self._choices: dict[int, _Rows] = {}
        self._failed = False
        self._own: int | None = params.logprobs
        """The number of log-probabilities that the server itself asked for, and gets."""
        self.top_k = max(self._own or 0, top)
        self.params = copy.copy(params)
        self.params.logprobs = self.top_k
        if sampled is not None and sampled.xargs:
            self.params.extra_args = without_acting(params.extra_args or {}) | sampled.xargs
        if self._own is None and params.prompt_logprobs is None:
            # Those of the prompt would be flat, too, and the server cannot write them as JSON then.
            self.params.flat_logprobs = True

    def update(self, output: Any) -> None:
        """Records one RequestOutput, and removes from it what the server did not ask for. Never raises.

        Where that cannot be removed the server gets more logprobs than it asked for, and a dropped answer is counted.
        """
        try:
            if not self._failed:
                self._record(output)
        except Exception as error:  # noqa: BLE001 - the client's response must not depend on it
            self._fail(error)
        for completion in output.outputs:
            try:
                self._restore(completion)
            except Exception as error:  # noqa: BLE001 - as above
                self._fail(error)

    def _restore(self, completion: Any) -> None:
        if self._own is None:
            completion.logprobs = completion.cumulative_logprob = None
        elif self._own < self.top_k and completion.logprobs is not None:
            completion.logprobs = _shortened(completion.logprobs, completion.token_ids, self._own)

    def _record(self, output: Any) -> None:
        for completion in output.outputs:
            rows = self._choices.setdefault(completion.index, _Rows())
            rows.add(list(completion.token_ids), completion.logprobs, self.top_k)
            if _bytes(rows.tokens, self.top_k, len(output.prompt_token_ids)) > MAX_ANSWER_BYTES:
                raise ValueError("it is too long")
            if (
                self._sampled is not None
                and rows.tokens + len(output.prompt_token_ids) > self._sampled.policy.max_tokens
            ):
                self._leave(Lost.TOO_LONG)
                return
            if completion.finish_reason is not None:
                del self._choices[completion.index]
                self._push(completion, rows, output.prompt_token_ids)
        self._unfinished = not output.finished
        prompt = len(output.prompt_token_ids)
        self._hold(sum(_bytes(rows.tokens, self.top_k, prompt) for rows in self._choices.values()))
        if self._room.bytes > self._room.max_bytes:
            self._leave(Lost.PLUGIN_BUSY)
            if self._sampled is None:
                self._queue.drop()

    def _hold(self, size: int) -> None:
        """Notes the bytes of the choices that have not ended."""
        self._room.bytes += size - self._held
        self._held = size

    def _push(self, completion: Any, rows: _Rows, prompt_ids: list[int]) -> None:
        """Queues a choice that has ended."""
        names = {"call": self._call, "choice": completion.index, "choices": self._number}
        request = None if self._sampled is None else self._sampled.request
        reason = str(completion.finish_reason)[:64]
        if request is not None and (reason == "abort" or not rows.tokens):
            self._lost(Lost.INCOMPLETE)
            return
        answer = RecordedAnswer(self._nonce, names, self.top_k, rows, prompt_ids, reason, request)
        if not self._queue.push(answer):
            self._lost(Lost.LINK_FULL)

    def refuse(self) -> None:
        """Counts that there is no room for the recording."""
        if self._sampled is None:
            self._queue.drop()
        self._lost(Lost.PLUGIN_BUSY)

    def end(self) -> None:
        """Notes that the generation has ended, or that its client has left."""
        if self._unfinished and not self._failed:
            self._leave(Lost.INCOMPLETE)
        self._hold(0)

    def _leave(self, reason: str) -> None:
        """Records nothing more, for a reason that is not a fault."""
        self._failed = True
        self._choices.clear()
        self._hold(0)
        self._lost(reason)

    def _lost(self, reason: str) -> None:
        if self._sampled is not None and self._sampler is not None:
            self._sampler.lost(reason)

    def _fail(self, error: Exception) -> None:
        if self._failed:
            return
        self._leave(Lost.HOOK_ERROR)
        self._queue.drop()
        log.warning("an answer was not recorded: %s: %s", type(error).__name__, error)


class AnswerTap:
    """Decides which generations are recorded. `start_sender`: called once, as the
    sender also learns the secrets from the admin ports. secrets: those that requests to be recorded are signed with."""

    def __init__(
        self,
        queue: AnswerQueue,
        start_sender: Callable[[], None],
        secrets: Secrets,
        sampler: PassiveSampler | None = None,
    ) -> None:
        self._sampler = sampler or PassiveSampler(secrets, queue.has_room)
        self._queue = queue
        self._start_sender = start_sender
        self._secrets = secrets
        self._started = False
        self._calls = Numbering()
        self._active = 0
        self.room = Room()
        self._checksums: asyncio.Task[None] | None = None
        """The last computation of checksums."""

    def start(self) -> None:
        """Starts the sender, once, so that the secrets are known before the first request that is signed with them."""
        if not self._started:
            self._started = True
            self._start_sender()

    def begin(
        self, engine: Any, prompt: Any, params: Any, request_id: Any = "", lora_request: Any = None
    ) -> Recording | None:
        """Returns a recording, if the request asks for one, or is sampled here. Never raises."""
        try:
            extra = getattr(params, "extra_args", None)
            if extra and CHECKSUMS_KEY in extra:
                self._begin_checksums(engine, extra)
            recording = self._begin(engine, prompt, params) if extra and TAP_TOP_KEY in extra else None
            return recording or self._begin_sampled(engine, prompt, params, str(request_id), lora_request)
        except ValueError:
            return None  # vLLM refuses the request when it validates its parameters
        except Exception as error:  # noqa: BLE001 - the request must not depend on it
            self._queue.drop()
            log.warning("an answer cannot be recorded: %s: %s", type(error).__name__, error)
            return None

    def _begin(self, engine: Any, prompt: Any, params: Any) -> Recording | None:
        self.start()
        asked = xargs.parse(params.extra_args, signed=self._secrets.signed(params.extra_args))
        if asked.nonce is None or asked.top is None or hasattr(prompt, "__aiter__"):
            return None
        if not _recordable(params):
            self._queue.drop()
            return None
        call = self._calls.next(asked.nonce)
        return Recording(self._queue, self.room, asked.nonce, call, params, _most(engine, asked.top))

    def _begin_checksums(self, engine: Any, extra: dict[str, Any]) -> None:
        """Computes checksums of the weights while the request that asks for them is served."""
        self.start()
        nonce = extra[CHECKSUMS_KEY]
        running = self._checksums is not None and not self._checksums.done()
        if running or not self._secrets.signed(extra) or not xargs.is_nonce(nonce):
            return
        in_progress = engine.get_num_unfinished_requests()

        async def compute() -> None:
            self._queue.push_checksums(await checksums.measure(engine, nonce, in_progress))

        self._checksums = asyncio.get_running_loop().create_task(compute(), name="hemostat checksums")

    def _begin_sampled(
        self, engine: Any, prompt: Any, params: Any, request_id: str, lora_request: Any
    ) -> Recording | None:
        if self._sampler.policy() is None:
            return None
        config = engine.model_config
        model = config.served_model_name if lora_request is None else lora_request.lora_name
        name = model[0] if isinstance(model, list) else str(model)
        sampled = self._sampler.sample(prompt, params, request_id, name)
        if sampled is None:
            return None
        if not _recordable(params):
            self._sampler.lost(Lost.CLIENT_LOGPROBS)
            return None
        top = _most(engine, min(sampled.policy.top_k, xargs.MAX_TOP))
        return Recording(self._queue, self.room, sampled.nonce, 0, params, top, sampled, self._sampler)

    def enter(self, recording: Recording) -> bool:
        """Returns True if one more generation may be recorded now; then `leave` must be called when it ends. If it may
        not, that is counted.
        """
        if self._active >= MAX_ACTIVE:
            recording.refuse()
            return False
        self._active += 1
        return True

    def leave(self) -> None:
        self._active -= 1


def _recordable(params: Any) -> bool:
    """Returns True if the logprobs that are added can be told from the client's own."""
    own = params.logprobs
    # Ids that the client chooses, or all of the vocabulary, are not the most likely ones.
    chosen = getattr(params, "logprob_token_ids", None)
    known_kind = params.output_kind.name in ("DELTA", "FINAL_ONLY")
    return not chosen and known_kind and (own is None or 0 <= own <= xargs.MAX_TOP)


def _most(engine: Any, top: int) -> int:
    """Returns how many of so many log-probabilities the server allows; its limit is -1 if there is none."""
    limit: int = engine.model_config.max_logprobs
    return top if limit < 0 else min(top, limit)


class _ImportWatch(importlib.abc.MetaPathFinder):
    """Calls `install` once the engine's module has been imported, in whichever process that happens."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != ENGINE_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        loader = None if spec is None else spec.loader
        if spec is None or loader is None:
            return spec
        execute = loader.exec_module

        def execute_and_install(module: Any) -> None:
            execute(module)
            install()

        loader.exec_module = execute_and_install  # type: ignore[method-assign]
        return spec


def watch() -> None:
    """Wraps `AsyncLLM.generate` now, or as soon as its module is imported."""
    if ENGINE_MODULE in sys.modules:
        install()
    elif not any(isinstance(finder, _ImportWatch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ImportWatch())


def install() -> None:
    """Wraps `AsyncLLM.generate` in a process that has imported it; else, and without an admin port, does nothing.

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
        secrets = Secrets()
        sampler = PassiveSampler(secrets, queue.has_room)
        sender = AnswerSender(queue, Peers(settings), uuid.uuid4().hex, secrets, sampler)
        tap = AnswerTap(queue, sender.start, secrets, sampler)
        engine_class.generate = wrapped(generate, tap)
        setattr(engine_class, _WRAPPED, True)
        tap.start()
    except Exception as error:  # noqa: BLE001 - vLLM must start whatever happens here
        log.warning("answers are not handed out: %s: %s", type(error).__name__, error)


def wrapped(generate: Callable[..., AsyncGenerator[Any, None]], tap: AnswerTap) -> Callable[..., Any]:
    """Returns `generate` with the tap; a request that is not recorded gets the same generator."""

    @functools.wraps(generate)
    def tapped(engine: Any, prompt: Any, sampling_params: Any, *arguments: Any, **named: Any) -> Any:
        request_id = arguments[0] if arguments else named.get("request_id", "")
        recording = tap.begin(engine, prompt, sampling_params, request_id, named.get("lora_request"))
        if recording is None:
            return generate(engine, prompt, sampling_params, *arguments, **named)

        def start(params: Any) -> AsyncGenerator[Any, None]:
            return generate(engine, prompt, params, *arguments, **named)

        return _recorded(start, sampling_params, recording, tap)

    return tapped


async def _recorded(
    start: Callable[[Any], AsyncGenerator[Any, None]], params: Any, recording: Recording, tap: AnswerTap
) -> AsyncGenerator[Any, None]:
    # Here and not in `begin`: a generator that is never started never ends.
    entered = tap.enter(recording)
    try:
        # The engine aborts a request when its generator is closed.
        async with contextlib.aclosing(start(recording.params if entered else params)) as outputs:
            async for output in outputs:
                if entered:
                    recording.update(output)
                yield output
    finally:
        if entered:
            recording.end()
            tap.leave()
