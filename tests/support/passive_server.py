"""A server of vLLM whose plugin samples requests itself, in process and without vLLM's engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from tests.support.async_llm import PROMPT, Engine, params

from hemostat_calibration.passive import PassivePolicy
from hemostat_engine.answer_sender import AnswerQueue
from hemostat_engine.answer_tap import AnswerTap, wrapped
from hemostat_engine.client_headers import ClientHeaders
from hemostat_engine.passive import PassiveSampler
from hemostat_engine.secrets import Secrets

POLICY = PassivePolicy(
    rate=1.0,
    allow_on=False,
    top_k=2,
    max_tokens=100,
    tap=False,
    grammars=False,
    labels=frozenset({"batch"}),
    salt=b"salt" * 8,
    client_header="authorization",
)
TOKENS = {"type": "token", "prompt_token_ids": PROMPT}
SECRET = "s" * 32


class Server:
    """vLLM's server with the wrapped engine. `now` is the time."""

    def __init__(self, policy: PassivePolicy | None = POLICY, choices: list[list[list[int]]] | None = None) -> None:
        self.now = 0.0
        self.engine = Engine(choices or [[[3, 8], [4]]])
        self.engine.model_config.served_model_name = "served"
        self.queue = AnswerQueue()
        self.secrets = Secrets(lambda: self.now)
        self.secrets.update([SECRET])
        self.sampler = PassiveSampler(self.secrets, self.queue.has_room, lambda: 0.5, lambda: self.now)
        if policy is not None:
            self.sampler.heard("http://control", policy, "prefix")
        self.start_tap()

    def start_tap(self) -> None:
        """Wraps `generate` with the queue and the sampler that it has now."""
        self.tap = AnswerTap(self.queue, lambda: None, self.secrets, self.sampler)
        self.generate = wrapped(Engine.generate, self.tap)

    def serve(
        self, given: Any = None, prompt: Any = None, request_id: str = "cmpl-1-0", limit: int = 10**6, headers: Any = ()
    ) -> list[Any]:
        async def run() -> list[Any]:
            seen: list[Any] = []

            async def app(*_: Any) -> None:
                outputs = self.generate(self.engine, prompt or TOKENS, given or params(), request_id)
                async for output in outputs:
                    seen.append(output)
                    if len(seen) == limit:
                        await outputs.aclose()

            if headers:
                await ClientHeaders(app)({"type": "http", "headers": headers}, None, None)
            else:
                await app()
            return seen

        return asyncio.run(run())

    def recorded(self) -> list[dict[str, Any]]:
        return self.queue.take(1 << 30, 1 << 30)

    def unscored(self) -> dict[str, int]:
        return self.sampler.counts().unscored


def run(generator: AsyncGenerator[Any, None]) -> tuple[list[Any], int]:
    """Returns what a generator yields, and how often it waits, which must not depend on the plugin."""
    outputs, waits = [], 0
    while True:
        step = generator.__anext__()
        try:
            while True:
                step.send(None)
                waits += 1
        except StopIteration as yielded:
            outputs.append(yielded.value)
        except StopAsyncIteration:
            return outputs, waits
