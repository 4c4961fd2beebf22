"""Replays a set through a public address, behind which a router chooses the engine of each request.

Each sequence is asked for in two ways, in a random order:

- **free**: on a connection of its own, without cookies and without a session, so that nothing makes a router stick;
- **in a session**: on a connection of its own, too, with a session in the header fields that routers take one from.

A request whose answer is far from the baseline is sent again: in its session, so that the same engine answers, or until
an engine shows it again. Which engine has answered is known where a control process and the plugin are (`Trace`). Then
free requests go on until each engine that reports has answered enough of them, or it shows that it does not.
"""

from __future__ import annotations

import asyncio
import math
import random
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from hemostat.canaries.client import CanaryClient, Progress
from hemostat.engines.messages import Trace
from hemostat.reference.server import VllmServer
from hemostat_calibration.canaries import MIN_SEQUENCES, CanarySet, Comparison
from hemostat_calibration.canary_route import Routed, compare_routed, far_parts, missed

SESSION_FIELDS = ("x-session-id", "x-user-id")
"""The header fields that vllm-router's consistent hashing and production-stack's sessions are told by."""
SHARE = 0.1
"""The share of the requests of an engine whose probability of having been missed is stated."""
AGAIN = 8
"""The number of free requests with the same sequence after an answer that is far away."""
MAX_AGAIN = 24
"""The number of such requests of a whole replay."""
MAX_PASSES = 4
"""The largest number of free passes over all sequences."""
TAP_SECONDS = 5.0
"""The time after which it is not known any more which engine has answered: plugins report four times a second."""
TAP_TICK_SECONDS = 0.25

Connect = Callable[[Mapping[str, str]], VllmServer]
"""A function that returns a new client of the public address, with these header fields."""
AskTrace = Callable[[Sequence[str], int], Awaitable[Trace]]
"""A function that returns which engines have answered requests with these nonces, and so many new ones."""


@dataclass(frozen=True, slots=True)
class RouteFindings:
    """The findings of a replay through a route.

    comparisons: by the boot id of the engine that has answered; "" stands for all requests of which it is not known.
    names: of the engines that report, by boot id; empty without a control process. requests: the number of free
    requests, and of sessions.
    """

    comparisons: Mapping[str, Comparison]
    names: Mapping[str, str]
    requests: tuple[int, int]

    @property
    def changed(self) -> bool:
        return any(comparison.changed for comparison in self.comparisons.values())

    @property
    def unknown(self) -> bool:
        """True if an engine differs by no more than a mode may, or was not reached."""
        return bool(self.unreached) or any(comparison.differs for comparison in self.comparisons.values())

    @property
    def unreached(self) -> list[str]:
        """The names of the engines that no request has reached."""
        return [self.name(boot) for boot in self.names if boot not in self.comparisons]

    def name(self, boot: str) -> str:
        return self.names.get(boot) or (f"the engine with boot id {boot[:8]}" if boot else "")

    @property
    def chance(self) -> str:
        """One line: the probability that an engine was missed, where it is not known which have answered."""
        ways = zip(self.requests, ("requests without a session", "sessions"), strict=True)
        chances = " and ".join(
            f"{math.ceil(1000 * missed(count, SHARE)) / 1000:.1%} among {count} {way}" for count, way in ways
        )
        return (
            f"which engines have answered is not known: one that gets a tenth of them or more was missed with a "
            f"probability of at most {chances}"
        )


class RouteReplay:
    """One replay. client: of the public address. ask: None where no control process tells which engine answers."""

    def __init__(
        self,
        taken: CanarySet,
        client: CanaryClient,
        connect: Connect,
        tolerance: float,
        ask: AskTrace | None,
        progress: Progress,
    ) -> None:
        self._taken = taken
        self._client = client
        self._connect = connect
        self._tolerance = tolerance
        self._ask = ask
        self._progress = progress
        self._answers: list[Routed] = []
        self._awaited: dict[str, int] = {}
        """The numbers of the answers whose engine is not known yet, by nonce."""
        self._engines: dict[str, str] = {}
        self._again = 0

    async def run(self) -> RouteFindings:
        """Raises ReferenceFailure if the public address cannot be asked."""
        order = list(range(len(self._taken.canaries)))
        random.shuffle(order)
        for done, sequence in enumerate(order, 1):
            fields = dict.fromkeys(SESSION_FIELDS, f"hemostat-canary-{secrets.token_hex(8)}")
            if await self._asked(sequence, fields):
                await self._asked(sequence, fields)
            self._progress("sequences scored in sessions", done, len(order))
        free = 0
        for _ in range(MAX_PASSES):
            before = self._reached()
            random.shuffle(order)
            for sequence in order:
                free += 1
                if await self._asked(sequence, {}):
                    await self._show_again(sequence)
                self._progress("sequences scored without a session", free, max(free, len(order)))
            await self._settle()
            lacking = [boot for boot in self._engines if self._reached()[boot] < MIN_SEQUENCES]
            if all(self._reached()[boot] == before[boot] for boot in lacking):
                break
        comparisons = compare_routed(self._taken, self._answers, self._tolerance)
        return RouteFindings(comparisons, self._engines, (free, len(order)))

    def _reached(self) -> Counter[str]:
        """Returns the number of sequences that each engine has answered."""
        return Counter(engine for engine, _ in {(answer.engine, answer.sequence) for answer in self._answers})

    async def _show_again(self, sequence: int) -> None:
        """Asks for a sequence again, until an engine shows again what one has shown."""
        for _ in range(AGAIN):
            if self._again >= MAX_AGAIN:
                return
            self._again += 1
            if await self._asked(sequence, {}):
                return

    async def _asked(self, sequence: int, fields: Mapping[str, str]) -> bool:
        """Asks for one sequence. Returns True if a part of it is far away."""
        canary = self._taken.canaries[sequence]
        trace = await self._traced(1)
        xargs = next(iter(trace.requests.values()), None)
        server = self._connect(fields)
        try:
            more = {} if xargs is None else {"vllm_xargs": xargs}
            answer = Routed(sequence, "", await self._client.score_at(server, canary, more))
        finally:
            await server.close()
        self._awaited |= dict.fromkeys(trace.requests, len(self._answers))
        self._answers.append(answer)
        return far_parts(self._taken, answer, self._tolerance)

    async def _traced(self, new: int) -> Trace:
        """Notes which engines have answered, and returns new nonces."""
        if self._ask is None:
            return Trace()
        trace = await self._ask(list(self._awaited)[-32:], new)
        self._engines |= trace.engines
        for nonce, boot in trace.answered.items():
            number = self._awaited.pop(nonce)
            self._answers[number] = replace(self._answers[number], engine=boot)
        return trace

    async def _settle(self) -> None:
        """Waits until it is known which engines have answered; not long, as an engine may be without the plugin."""
        for _ in range(int(TAP_SECONDS / TAP_TICK_SECONDS)):
            await self._traced(0)
            if not self._awaited:
                return
            await asyncio.sleep(TAP_TICK_SECONDS)
        self._awaited.clear()
