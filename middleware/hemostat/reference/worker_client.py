"""The control process's end of a reference worker: one process, its pending requests, and its restarts."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

import msgspec
import numpy as np
import numpy.typing as npt

from hemostat.ipc.child_process import ChildExited, FramedChild
from hemostat.ipc.supervisor import ChildRefused, Supervisor
from hemostat.ipc.turns import half_of, usable_cores
from hemostat.reference import worker_messages
from hemostat.reference.protocol import FailureReason, ReferenceFailure, ReferenceScores, ScoreRequest
from hemostat_calibration.arrays import Floats
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.records import Candidates, RecoveredDivergence

log = logging.getLogger("hemostat.reference")

RESTART_SECONDS = (0.5, 1.0, 2.0, 5.0, 15.0, 60.0)
"""The longest pause before a worker that ended is started again, by the number of failures in a row."""

LoadRequest = worker_messages.Load | worker_messages.LoadHead
TokenRequest = Callable[[int], worker_messages.Request]


class ReferenceWorker:
    """A worker process. When it ends, what was requested fails (DOWN), and another one is started.

    Implements `hemostat.ipc.supervisor.ChildOwner`. Its other methods raise ReferenceFailure.
    """

    def __init__(self, load: LoadRequest) -> None:
        self._load = load
        self._process: Supervisor[LoadRequest, worker_messages.Loaded] = Supervisor(
            "hemostat.reference.worker", self, RESTART_SECONDS, {}
        )
        self._keeper: asyncio.Task[None] | None = None
        self._loaded: asyncio.Future[worker_messages.Loaded] | None = None
        """The outcome of the last start; a failure once the process has ended."""
        self._load_failure: ReferenceFailure | None = None
        """The process's message that the model does not load."""
        self._chosen: worker_messages.Chosen | None = None
        """The device, if the worker has chosen it."""
        self._only = ""
        """The device of the worker that loaded last, if it has chosen it."""
        self._child: FramedChild | None = None
        self._numbers = itertools.count()
        self._pending: dict[int, asyncio.Future[worker_messages.Answer]] = {}
        self._held: set[str] = set()
        self._turn = asyncio.Lock()
        self._closed = False

    async def start(self) -> worker_messages.Loaded:
        """Loads what there is to load; returns at once when it is loaded. May be called again after a failure. Between
        the end of a worker and the start of the next one it raises at once."""
        if self._closed:
            raise ReferenceFailure(FailureReason.DOWN, "the reference is closed")
        if self._loaded is None or self._process.target is None:
            self._loaded = asyncio.get_running_loop().create_future()
            self._process.set_target(self._load)
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._process.run(), name="reference worker")
        return await asyncio.shield(self._loaded)

    @property
    def device(self) -> str:
        """The device that the worker has chosen, with the reason; "" if the configuration names it."""
        return f"{self._chosen.device}: {self._chosen.reason}" if self._chosen is not None else ""

    async def score(self, request: ScoreRequest, states: npt.NDArray[np.uint16] | None = None) -> ReferenceScores:
        """Scores as `Reference.score` says. E_r[Δz] is exact if Δz depends on the token and a given code. Otherwise it
        is NaN: all others need the compressed model's logits at every id, which the reference does not have.

        states: for an output head, which does not read the prompt: see `worker_messages.Score`.
        """
        loaded = self.running()
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
        answer = await self._score(request, bases, states)
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

    async def _score(
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
        self.running()
        assert self._child is not None
        future: asyncio.Future[worker_messages.Answer] = asyncio.get_running_loop().create_future()
        self._pending[number] = future
        try:
            self._child.send(worker_messages.REQUESTS.encode(request))
            answer = await future
        except ChildExited as why:
            raise _ended(why) from why
        finally:
            self._pending.pop(number, None)
        if isinstance(answer, worker_messages.Failed):
            self._held = set()  # it may have failed before it stored the bases of this request
            raise ReferenceFailure(answer.reason, answer.message)
        return answer

    def running(self) -> worker_messages.Loaded:
        """Returns what the running worker has loaded."""
        if self._loaded is None or not self._loaded.done():
            raise ReferenceFailure(FailureReason.DOWN, "the reference worker is not running")
        return self._loaded.result()

    async def close(self) -> None:
        """Ends the process; the request under way fails."""
        self._closed = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        self._fail(ReferenceFailure(FailureReason.DOWN, "the reference is closed"))

    # --- the process -----------------------------------------------------------------------------------------------

    def wants_child(self) -> bool:
        return True

    def starting(self, target: LoadRequest) -> None:
        if self._loaded is None or self._loaded.done():
            self._loaded = asyncio.get_running_loop().create_future()

    async def begin(self, child: FramedChild, target: LoadRequest) -> None:
        """Sends what to load. A worker that is started again is on the same device or on the CPU: another device may be
        free just because the engine that serves clients is being started there."""
        self._child = child
        child.send(worker_messages.REQUESTS.encode(msgspec.structs.replace(target, only=self._only)))

    def receive(self, body: bytes) -> None:
        answer = worker_messages.ANSWERS.decode(body)
        match answer:
            case worker_messages.Chosen():
                self._chosen = answer
                log.info("the reference is loaded on %s: %s", answer.device, answer.reason)
            case worker_messages.Loaded():
                self._process.ready(answer)
            case worker_messages.Failed(id=number) if number < 0:
                self._load_failure = ReferenceFailure(
                    answer.reason, f"{_name(self._load)} does not load: {answer.message}"
                )
                self._process.refused(str(self._load_failure))
            case _:
                if (future := self._pending.get(answer.id)) is not None and not future.done():
                    future.set_result(answer)

    def began(self, ready: worker_messages.Loaded, target: LoadRequest) -> None:
        if self._chosen is not None:
            self._only = self._chosen.device
        assert self._loaded is not None
        self._loaded.set_result(ready)

    async def exchange(self, child: FramedChild) -> bool:
        """Returns False: requests are sent where they are made."""
        return False

    def exited(self, why: ChildExited) -> None:
        self._fail(_ended(why))

    async def closed(self) -> None:
        return

    def failed(self, why: ChildExited | ChildRefused) -> None:
        if isinstance(why, ChildRefused):
            assert self._load_failure is not None
            self._fail(self._load_failure)
            self._process.set_target(None)  # Something has to be mended first: the next `start` tries again.
        else:
            self._fail(_ended(why))
            log.error("the reference worker ended: %s", why)

    def _fail(self, failure: ReferenceFailure) -> None:
        """Fails all that waits for the process, and what asks for it until the next start."""
        for future in self._pending.values():
            if not future.done():
                future.set_exception(failure)
        if self._loaded is None or self._loaded.done():
            self._loaded = asyncio.get_running_loop().create_future()
        self._loaded.set_exception(failure)
        self._loaded.exception()  # it may have no waiter

    def reset(self) -> None:
        self._child = None
        self._held = set()


def _ended(why: ChildExited) -> ReferenceFailure:
    return ReferenceFailure(FailureReason.DOWN, f"the reference worker ended: {why}")


def _name(load: LoadRequest) -> str:
    return load.model if isinstance(load, worker_messages.Load) else f"the output head of {load.folder}"


def threads_or_default(threads: int | None) -> int:
    """Returns the number of threads. For None, this is half of the cores that this process may use, at least one."""
    return threads or half_of(usable_cores())


def _up(profile: CalibrationProfile) -> npt.NDArray[np.floating]:
    """Returns the matrix [V, r] whose product with a given code is Δz; only a family with anchors has codes."""
    basis = profile.spec.basis
    assert basis is not None
    return basis(profile.parameters)


def _basis(profile: CalibrationProfile) -> worker_messages.Basis:
    up = _up(profile)
    return worker_messages.Basis(up.astype("<f2").tobytes(), up.shape[1], profile.clamp_nats)
