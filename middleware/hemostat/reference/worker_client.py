"""The control process's end of a reference worker: one process, its pending requests, and its restarts."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import replace

import msgspec
import numpy as np
import numpy.typing as npt

from hemostat.ipc.child_process import ChildExited, FramedChild
from hemostat.reference import worker_messages
from hemostat.reference.protocol import FailureReason, ReferenceFailure, ReferenceScores, ScoreRequest
from hemostat_calibration.arrays import Floats
from hemostat_calibration.backoff import Backoff
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.records import Candidates, RecoveredDivergence

log = logging.getLogger("hemostat.reference")

RESTART_SECONDS = (0.5, 1.0, 2.0, 5.0, 15.0, 60.0)
"""The longest pause before a worker that ended is started again, by the number of failures in a row."""

TokenRequest = Callable[[int], worker_messages.Request]


class ReferenceWorker:
    """A worker process. When it ends, the pending request fails (DOWN), and another one is started.

    Every method raises ReferenceFailure.
    """

    def __init__(self, load: worker_messages.Load | worker_messages.LoadHead) -> None:
        self._load = load
        self._process: _Process | None = None
        self._loaded: worker_messages.Loaded | None = None
        self._starting = asyncio.Lock()
        self._keeper: asyncio.Task[None] | None = None
        self._closed = False

    async def start(self) -> worker_messages.Loaded:
        """Loads what there is to load; returns at once when it is loaded. May be called again after a failure."""
        async with self._starting:
            if self._closed:
                raise ReferenceFailure(FailureReason.DOWN, "the reference is closed")
            if self._process is None or self._process.exited.is_set():
                self._process = None
                self._process, self._loaded = await _Process.start(self._load)
                self._keep_device(self._process.chosen)
            if self._keeper is None:
                self._keeper = asyncio.create_task(self._keep(), name="reference worker")
            assert self._loaded is not None
            return self._loaded

    @property
    def device(self) -> str:
        """The device that the worker has chosen, with the reason; "" if the configuration names it."""
        chosen = self._process.chosen if self._process is not None else None
        return f"{chosen.device}: {chosen.reason}" if chosen is not None else ""

    def _keep_device(self, chosen: worker_messages.Chosen | None) -> None:
        """Keeps the device: a worker that is started again is on the same device or on the CPU: another device may be
        free just because the engine that serves clients is being started there."""
        if chosen is None:
            return
        self._load = msgspec.structs.replace(self._load, only=chosen.device)

    async def _keep(self) -> None:
        backoff = Backoff(RESTART_SECONDS, random.random)
        while True:
            if self._process is not None and not self._process.exited.is_set():
                await self._process.exited.wait()
                log.error("the reference worker ended: %s", self._process.exit_summary())
            await asyncio.sleep(backoff.pause())
            try:
                await self.start()
                backoff.reset()
            except ReferenceFailure as failure:
                log.error("the reference did not start again: %s", failure)

    async def score(self, request: ScoreRequest, states: npt.NDArray[np.uint16] | None = None) -> ReferenceScores:
        """Scores as `Reference.score` says. E_r[Δz] is exact if Δz depends on the token and a given code. Otherwise it
        is NaN: all others need the compressed model's logits at every id, which the reference does not have.

        states: for an output head, which does not read the prompt: see `worker_messages.Score`.
        """
        process, loaded = self.running()
        size = loaded.vocab_size
        bases = {p.version: p for p in request.profiles if p.version in request.codes and p.vocab_size == size}
        for version, profile in bases.items():
            shape = (len(request.output), _up(profile).shape[1])
            if (got := request.codes[version].shape) != shape:
                raise ReferenceFailure(
                    FailureReason.CODE, f"the code of profile {version} has shape {got}, not {shape}"
                )
        allowed = request.allowed
        if allowed is not None and (allowed.tokens, allowed.vocab_size) != (len(request.output), size):
            raise ReferenceFailure(
                FailureReason.VOCABULARY,
                f"the allowed ids are of {allowed.tokens} positions and {allowed.vocab_size} ids: they must be of "
                f"{len(request.output)} and {size}",
            )
        if allowed is not None or not loaded.compares:
            request = replace(request, compressed=None)
        answer = await process.score(request, bases, states)
        tokens, width = request.ids.shape

        def floats(data: bytes) -> Floats:
            return np.frombuffer(data, "<f8").astype(np.float64)

        unknown = np.full(tokens, np.nan)
        return ReferenceScores(
            at=floats(answer.at).reshape(tokens, width),
            top=Candidates(
                np.frombuffer(answer.top_ids, "<i4").astype(np.int32).reshape(tokens, width),
                floats(answer.top_logprobs).reshape(tokens, width),
            ),
            emitted=floats(answer.emitted),
            entropy=floats(answer.entropy),
            expected_shift={
                p.version: floats(answer.expected[p.version]) if p.version in answer.expected else unknown.copy()
                for p in request.profiles
            },
            hidden=np.frombuffer(answer.hidden, "<f4").astype(np.float32).reshape(tokens, -1)
            if answer.hidden
            else None,
            recovered=RecoveredDivergence(*floats(answer.recovered).reshape(7, tokens)) if answer.recovered else None,
        )

    async def token_ids(self, request: TokenRequest) -> list[int]:
        return await self.running()[0].token_ids(request)

    async def close(self) -> None:
        """Ends the process; the request under way fails."""
        self._closed = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        async with self._starting:
            if self._process is not None:
                await self._process.close()

    def running(self) -> tuple[_Process, worker_messages.Loaded]:
        if self._process is None or self._process.exited.is_set():
            raise ReferenceFailure(FailureReason.DOWN, "the reference worker is not running")
        assert self._loaded is not None
        return self._process, self._loaded


def threads_or_default(threads: int | None) -> int:
    """Returns the number of threads. For None, this is half of the cores that this process may use, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return threads or max(1, cores // 2)


def _up(profile: CalibrationProfile) -> npt.NDArray[np.floating]:
    """Returns the matrix [V, r] whose product with a given code is Δz; only a family with anchors has codes."""
    basis = profile.spec.basis
    assert basis is not None
    return basis(profile.parameters)


def _basis(profile: CalibrationProfile) -> worker_messages.Basis:
    up = _up(profile)
    return worker_messages.Basis(up.astype("<f2").tobytes(), up.shape[1], profile.clamp_nats)


class _Process:
    """One worker process and its pending requests."""

    def __init__(self) -> None:
        self._child: FramedChild | None = None
        self._numbers = itertools.count()
        self._pending: dict[int, asyncio.Future[worker_messages.Answer]] = {}
        self._held: set[str] = set()
        self._turn = asyncio.Lock()
        self._first: asyncio.Future[worker_messages.Answer] = asyncio.get_running_loop().create_future()
        self._ending: asyncio.Task[None] | None = None
        self.exited = asyncio.Event()
        self.chosen: worker_messages.Chosen | None = None
        """The device, where the worker has chosen it."""

    @classmethod
    async def start(
        cls, load: worker_messages.Load | worker_messages.LoadHead
    ) -> tuple[_Process, worker_messages.Loaded]:
        """Raises ReferenceFailure if the process does not start or the model does not load."""
        worker = cls()
        try:
            worker._child = await FramedChild.start("hemostat.reference.worker", worker._receive)
        except ChildExited as gone:
            raise ReferenceFailure(FailureReason.DOWN, f"the reference worker: {gone}") from gone
        worker._ending = asyncio.create_task(worker._end(worker._child), name="reference worker's end")
        try:
            worker._send(load)
            answer = await worker._first
        except BaseException:
            await worker.close()
            raise
        if isinstance(answer, worker_messages.Loaded):
            return worker, answer
        await worker.close()
        name = load.model if isinstance(load, worker_messages.Load) else f"the output head of {load.folder}"
        if isinstance(answer, worker_messages.Failed):
            raise ReferenceFailure(answer.reason, f"{name} does not load: {answer.message}")
        raise ReferenceFailure(FailureReason.PROTOCOL, f"the reference worker began with {type(answer).__name__}")

    async def score(
        self,
        request: ScoreRequest,
        bases: Mapping[str, CalibrationProfile],
        states: npt.NDArray[np.uint16] | None,
    ) -> worker_messages.Scored:
        prompt = request.prompt if states is None else request.prompt[:0]
        async with self._turn:  # a request whose caller is cancelled while waiting never reaches the worker
            number = next(self._numbers)
            # `_held` mirrors what the worker holds, in the order of the requests: no await between it and the send.
            new = {name: _basis(profile) for name, profile in bases.items() if name not in self._held}
            if not request.reshaped:
                self._held = set(bases)
            answer = await self._ask(
                number,
                worker_messages.Score(
                    id=number,
                    prompt=prompt.astype("<i4").tobytes(),
                    output=request.output.astype("<i4").tobytes(),
                    ids=request.ids.astype("<i4").tobytes(),
                    width=request.ids.shape[1],
                    bases=new,
                    wanted=list(bases),
                    codes={name: request.codes[name].astype("<f4").tobytes() for name in bases},
                    hidden=request.hidden,
                    reshaped=request.reshaped,
                    allowed=None if request.allowed is None else worker_messages.Allowed.of(request.allowed),
                    compressed=None
                    if request.compressed is None
                    else worker_messages.Compressed.of(request.compressed),
                    states=b"" if states is None else states.astype("<u2").tobytes(),
                ),
            )
        if not isinstance(answer, worker_messages.Scored):
            raise ReferenceFailure(FailureReason.PROTOCOL, f"the reference worker answered {type(answer).__name__}")
        return answer

    async def token_ids(self, request: TokenRequest) -> list[int]:
        async with self._turn:
            number = next(self._numbers)
            answer = await self._ask(number, request(number))
        if not isinstance(answer, worker_messages.TokenIds):
            raise ReferenceFailure(FailureReason.PROTOCOL, f"the reference worker answered {type(answer).__name__}")
        return answer.ids

    async def _ask(self, number: int, request: worker_messages.Request) -> worker_messages.Answer:
        future: asyncio.Future[worker_messages.Answer] = asyncio.get_running_loop().create_future()
        self._pending[number] = future
        try:
            self._send(request)
            answer = await future
        finally:
            self._pending.pop(number, None)
        if isinstance(answer, worker_messages.Failed):
            self._held = set()  # it may have failed before it stored the bases of this request
            raise ReferenceFailure(answer.reason, answer.message)
        return answer

    def _send(self, request: worker_messages.Request) -> None:
        assert self._child is not None
        try:
            self._child.send(worker_messages.REQUESTS.encode(request))
        except ChildExited as gone:
            raise ReferenceFailure(FailureReason.DOWN, f"the reference worker is not running: {gone}") from gone

    def _receive(self, body: bytes) -> None:
        answer = worker_messages.ANSWERS.decode(body)
        if isinstance(answer, worker_messages.Chosen):
            self.chosen = answer
            log.info("the reference is loaded on %s: %s", answer.device, answer.reason)
            return
        number = getattr(answer, "id", -1)
        future = self._first if number < 0 else self._pending.get(number)
        if future is not None and not future.done():
            future.set_result(answer)

    async def _end(self, child: FramedChild) -> None:
        """When the process ends, fail all pending requests."""
        await child.exited.wait()
        self.exited.set()
        for future in (self._first, *self._pending.values()):
            if not future.done():
                future.set_exception(
                    ReferenceFailure(FailureReason.DOWN, f"the reference worker ended: {self.exit_summary()}")
                )

    def exit_summary(self) -> str:
        """Returns the exit code and the last line of standard error."""
        assert self._child is not None
        return self._child.exit_summary()

    async def close(self) -> None:
        assert self._child is not None
        await self._child.close()
        if self._ending is not None:
            await self._ending
