"""The allowed ids of captures, from a child process that is started when the first one needs it."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from hemostat.config.grammar import Grammar
from hemostat.config.schema import MAX_MODELS
from hemostat.ipc.backoff import Backoff
from hemostat.ipc.child_process import ChildExited, FramedChild
from hemostat.models import packages
from hemostat.openai.grammar_spec import GrammarSpec
from hemostat.shadow.grammar import wire
from hemostat.shadow.grammar.reasons import GrammarFailure, GrammarReason
from hemostat_calibration.allowed_sets import AllowedSets, words
from hemostat_calibration.arrays import Ids
from hemostat_calibration.errors import InvalidArgumentError

log = logging.getLogger("hemostat.grammar")

WORKER = "hemostat.shadow.grammar.worker"
PREPARE_SECONDS = 180.0
"""How long the process may take to import its packages and load a tokenizer."""
RESTART_SECONDS = (1.0, 2.0, 5.0, 15.0, 60.0)
"""Longest pause before it is started again, by the number of failures in a row."""
MAX_REMEMBERED = 256
"""Grammars that took too long or too much memory; the oldest is forgotten first."""
REMEMBERED_SECONDS = 600.0
"""For this long such a grammar is not tried again."""
MAX_TOKENIZERS = MAX_MODELS
"""That the process holds at a time, one a model; further ones are refused."""
_REMEMBERED = frozenset({GrammarReason.TIMEOUT, GrammarReason.MEMORY, GrammarReason.FAILED})


def unavailable(settings: Grammar) -> str:
    """Why no grammar can be rebuilt here; "" where it can."""
    if not settings.enabled:
        return "grammar.enabled is false"
    if settings.backend not in ("auto", "xgrammar"):
        return f"grammar.backend is {settings.backend}: only what xgrammar enforces can be rebuilt"
    return packages.missing("grammar")


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Of one model: the folder that has its tokenizer's files, and V of its logits."""

    folder: Path
    vocab_size: int


class GrammarMasks:
    """Owns the process that rebuilds grammars. clock: monotonic seconds."""

    def __init__(self, settings: Grammar, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._clock = clock
        self._worker: _Worker | None = None
        self._prepared: set[Tokenizer] = set()
        self._preparing: asyncio.Task[None] | None = None
        self._failure: GrammarFailure | None = None
        """Why there is no process, until `_due`."""
        self._due = 0.0
        self._without: dict[Tokenizer, tuple[GrammarFailure, float]] = {}
        """Those that the process could not use, which others have nothing to do with: why, and when to try again."""
        self._backoff = Backoff(RESTART_SECONDS)
        self._turn = asyncio.Lock()
        self._hopeless: OrderedDict[bytes, tuple[GrammarReason, float]] = OrderedDict()
        """By grammar, and until when."""
        self._ending: set[asyncio.Task[None]] = set()
        self._closed = False

    def ready(self, tokenizer: Tokenizer) -> bool:
        """Whether `sets` answers now: with sets, or with a failure. Begins to prepare what is needed."""
        if self._worker is not None and self._worker.exited:
            self._give_up(GrammarFailure(GrammarReason.FAILED, self._worker.exit_summary()))
        if self._closed or (self._worker is not None and tokenizer in self._prepared):
            return True
        if self._preparing is not None and not self._preparing.done():
            return False
        if self._failure is not None and self._clock() < self._due:
            return True
        if tokenizer in self._without and self._clock() < self._without[tokenizer][1]:
            return True
        self._failure = None
        self._without.pop(tokenizer, None)
        self._preparing = asyncio.create_task(self._prepare(tokenizer), name="grammar worker's start")
        return False

    async def _prepare(self, tokenizer: Tokenizer) -> None:
        message = wire.Prepare(0, str(tokenizer.folder), tokenizer.vocab_size, self._settings.memory_mib)
        if len(self._prepared) >= MAX_TOKENIZERS:
            shown = f"{MAX_TOKENIZERS} others are loaded; restart Hemostat where their models are gone"
            self._refuse(tokenizer, GrammarFailure(GrammarReason.NO_TOKENIZER, shown))
            return
        try:
            async with self._turn:
                if self._worker is None:
                    self._worker = await _Worker.start()
                await self._worker.ask(message, PREPARE_SECONDS)
            self._prepared.add(tokenizer)
        except GrammarFailure as failure:
            if failure.reason is GrammarReason.NO_TOKENIZER:
                self._refuse(tokenizer, failure)
            else:
                self._give_up(failure)
        except TimeoutError:
            self._give_up(GrammarFailure(GrammarReason.NOT_READY, f"no answer within {PREPARE_SECONDS:.0f} s"))

    async def sets(self, spec: GrammarSpec, output: Ids, start: int, tokenizer: Tokenizer) -> AllowedSets:
        """The allowed ids along `output` [T]: all of them before `start`. GrammarFailure. Call it where `ready`."""
        settings = self._settings
        worker = self._worker
        if self._closed:
            raise GrammarFailure(GrammarReason.NOT_READY)
        if tokenizer in self._without:
            raise self._without[tokenizer][0]
        if worker is None or tokenizer not in self._prepared:
            raise self._failure or GrammarFailure(GrammarReason.NOT_READY)
        key = hashlib.blake2b(msgspec.msgpack.encode(spec), digest_size=16).digest()
        reason, until = self._hopeless.get(key, (None, 0.0))
        if reason is not None and self._clock() < until:
            raise GrammarFailure(reason, "this grammar failed before")
        message = wire.Walk(
            id=0,
            folder=str(tokenizer.folder),
            vocab_size=tokenizer.vocab_size,
            spec=spec,
            output=output.astype("<i4").tobytes(),
            start=start,
            parser=settings.tool_call_parser or "",
            strict_level=settings.tool_strict_level,
            any_whitespace=not settings.disable_any_whitespace,
            stop_token_ids=settings.stop_token_ids,
        )
        async with self._turn:
            if worker is not self._worker:
                # It was ended, by another grammar, while this one waited for its turn.
                raise GrammarFailure(GrammarReason.NOT_READY)
            try:
                answer = await worker.ask(message, settings.seconds)
            except TimeoutError:
                failure = GrammarFailure(GrammarReason.TIMEOUT, f"longer than {settings.seconds:g} s")
                self._remember(key, failure.reason)
                self._give_up(failure, worker)
                raise failure from None
            except GrammarFailure as failure:
                if failure.reason in _REMEMBERED:
                    self._remember(key, failure.reason)
                    self._give_up(failure, worker)
                raise
        self._backoff.reset()
        if not isinstance(answer, wire.Walked):
            raise GrammarFailure(GrammarReason.FAILED, f"the worker answered {type(answer).__name__}")
        try:
            table = np.frombuffer(answer.table, "<u4").astype(np.uint32).reshape(-1, words(tokenizer.vocab_size))
            return AllowedSets(tokenizer.vocab_size, table, np.frombuffer(answer.rows, "<i4").astype(np.int32))
        except (ValueError, InvalidArgumentError) as error:
            raise GrammarFailure(GrammarReason.FAILED, str(error)) from error

    def _remember(self, key: bytes, reason: GrammarReason) -> None:
        self._hopeless.pop(key, None)
        self._hopeless[key] = reason, self._clock() + REMEMBERED_SECONDS
        while len(self._hopeless) > MAX_REMEMBERED:
            self._hopeless.popitem(last=False)

    def _refuse(self, tokenizer: Tokenizer, failure: GrammarFailure) -> None:
        """Of one model; the process goes on for the others."""
        log.warning("grammar worker: %s: %s: %s", tokenizer.folder, failure.reason, failure)
        self._without[tokenizer] = failure, self._clock() + RESTART_SECONDS[-1]
        while len(self._without) > MAX_TOKENIZERS:
            self._without.pop(next(iter(self._without)))

    def _give_up(self, failure: GrammarFailure, worker: _Worker | None = None) -> None:
        """End the process; it is started again, after a pause, by the next capture that needs it."""
        if worker is not None and worker is not self._worker:
            return  # another capture has done so
        log.warning("grammar worker: %s: %s", failure.reason, failure)
        self._failure = failure
        self._due = self._clock() + self._backoff.pause()
        self._prepared.clear()
        if self._worker is not None:
            ending = asyncio.create_task(self._worker.close(), name="grammar worker's end")
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)
            self._worker = None

    async def close(self) -> None:
        self._closed = True
        if self._preparing is not None:
            self._preparing.cancel()
            await asyncio.gather(self._preparing, return_exceptions=True)
        if self._worker is not None:
            await self._worker.close()
            self._worker = None
            self._prepared.clear()
        await asyncio.gather(*self._ending, return_exceptions=True)


class _Worker:
    """One process. It is asked one thing at a time."""

    def __init__(self) -> None:
        self._child: FramedChild | None = None
        self._numbers = itertools.count(1)
        self._number = 0
        self._answer: asyncio.Future[wire.Answer] | None = None

    @classmethod
    async def start(cls) -> _Worker:
        """GrammarFailure where the process cannot be started."""
        worker = cls()
        try:
            worker._child = await FramedChild.start(WORKER, worker._receive)
        except ChildExited as gone:
            raise GrammarFailure(GrammarReason.NOT_READY, str(gone)) from gone
        return worker

    @property
    def exited(self) -> bool:
        return self._child is not None and self._child.exited.is_set()

    async def ask(self, request: wire.Request, seconds: float) -> wire.Answer:
        """TimeoutError; GrammarFailure where it answers with one, or ends."""
        assert self._child is not None
        self._number = next(self._numbers)
        self._answer = asyncio.get_running_loop().create_future()
        exited = asyncio.create_task(self._child.exited.wait())
        try:
            self._child.send(wire.REQUESTS.encode(msgspec.structs.replace(request, id=self._number)))
            pending: set[asyncio.Future[Any]] = {self._answer, exited}
            done, _ = await asyncio.wait(pending, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        except ChildExited as gone:
            raise GrammarFailure(GrammarReason.FAILED, str(gone)) from gone
        finally:
            exited.cancel()
        if not done:
            raise TimeoutError
        if self._answer not in done:
            shown = self.exit_summary()
            memory = any(sign in shown for sign in ("bad_alloc", "MemoryError", "Cannot allocate memory"))
            raise GrammarFailure(GrammarReason.MEMORY if memory else GrammarReason.FAILED, f"it ended: {shown}")
        answer = self._answer.result()
        if isinstance(answer, wire.Failed):
            raise GrammarFailure(answer.reason, answer.message)
        return answer

    def _receive(self, body: bytes) -> None:
        answer = wire.ANSWERS.decode(body)
        if answer.id == self._number and self._answer is not None and not self._answer.done():
            self._answer.set_result(answer)

    def exit_summary(self) -> str:
        """Exit code and last line of standard error."""
        assert self._child is not None
        return self._child.exit_summary()

    async def close(self) -> None:
        assert self._child is not None
        await self._child.close()
