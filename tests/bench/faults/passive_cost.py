"""Measures what the plugin alone costs the process of vLLM's API server, in CPU time, without vLLM's own work.

The outputs are vLLM's own, and are made before the clock runs. What vLLM itself does to give log-probabilities is
measured apart, as the operations that its sampler runs on the CPU over a whole batch as soon as one request asks.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import msgspec
from tests.bench.faults import Row

NAME = "passive_cost"
TAKES = "half a minute"
LENGTH, TOP_K, ROUNDS = 200, 20, 60
ROW_LIMIT_US, REQUEST_LIMIT_US = 50.0, 50.0
BATCH, VOCABULARY = 32, 49_152


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """Microseconds of CPU time, medians over the rounds."""

    row: float
    """The time of one token of a sampled request, in the server's event loop."""
    sent: float
    """The time of one token, on the thread that makes the message."""
    unsampled: float
    """The time of a whole request that is not sampled."""


def seconds(call: Callable[[], Any]) -> float:
    began = time.thread_time()
    call()
    return time.thread_time() - began


def outputs(top: int | None) -> list[Any]:
    """Returns one answer as vLLM's engine yields it, a token at a time."""
    from tests.support.async_llm import PROMPT
    from vllm.logprobs import append_logprobs_for_next_position, create_sample_logprobs
    from vllm.outputs import CompletionOutput, RequestOutput

    made = []
    for n in range(LENGTH):
        logprobs = None
        if top is not None:
            logprobs = create_sample_logprobs(True)
            ids = [n + 7, *range(n, n + top)]
            values = [-1.0 - 0.1 * rank for rank in range(top + 1)]
            append_logprobs_for_next_position(logprobs, ids, values, [None] * len(ids), 1, top)
        last = n == LENGTH - 1
        output = CompletionOutput(
            0, "", [n + 7], None if top is None else -1.0, logprobs, finish_reason="stop" if last else None
        )
        made.append(RequestOutput("id", None, PROMPT, None, [output], last))
    return made


def drain(generator: AsyncGenerator[Any, None]) -> None:
    """Runs a generator that never waits to its end."""
    while True:
        try:
            generator.__anext__().send(None)
        except StopIteration:
            continue
        except StopAsyncIteration:
            return


def measure(rounds: int = ROUNDS) -> Cost:
    from tests.support.async_llm import Engine, params
    from tests.support.passive_server import POLICY, TOKENS, Server

    from hemostat_engine.answer_tap import wrapped

    class Ready(Engine):
        """An engine whose outputs are made before the clock runs."""

        ready: list[Any]

        async def generate(self, prompt: Any, sampling_params: Any, request_id: str) -> AsyncGenerator[Any, None]:
            for output in self.ready:
                yield output

    times: dict[str, list[float]] = {}
    given = params()

    def serve(name: str, generate: Callable[..., Any], top: int | None) -> None:
        engine = Ready([])
        engine.model_config.served_model_name = "served"
        engine.ready = outputs(top)
        times.setdefault(name, []).append(seconds(lambda: drain(generate(engine, TOKENS, given, "cmpl-1-0"))))

    def server_of(rate: float) -> Server:
        policy = dataclasses.replace(POLICY, rate=rate, top_k=TOP_K, max_tokens=10 * LENGTH)
        server = Server(policy)
        server.generate = wrapped(Ready.generate, server.tap)
        return server

    for _ in range(rounds):
        sampled, unsampled = server_of(1.0), server_of(0.0)
        serve("plain with logprobs", Ready.generate, TOP_K)
        serve("sampled", sampled.generate, TOP_K)
        serve("plain", Ready.generate, None)
        serve("unsampled", unsampled.generate, None)
        sent: list[bytes] = []
        times.setdefault("sent", []).append(seconds(lambda: sent.append(encoded(sampled))))  # noqa: B023
        assert len(sent[0]) > 8 * TOP_K * LENGTH
        assert not unsampled.recorded()
    medians = {name: 1e6 * statistics.median(values) for name, values in times.items()}
    return Cost(
        (medians["sampled"] - medians["plain with logprobs"]) / LENGTH,
        medians["sent"] / LENGTH,
        medians["unsampled"] - medians["plain"],
    )


def encoded(server: Any) -> bytes:
    """Returns the message of what was recorded, as the sender's thread makes it."""
    return msgspec.msgpack.encode(server.recorded())


def logprobs_ms(rounds: int = 5) -> float:
    """Returns the milliseconds that log-probabilities and the most likely ids of a whole batch take on one core."""
    import torch

    logits = torch.randn(BATCH, VOCABULARY)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return 1e3 * min(seconds(lambda: logits.log_softmax(-1).topk(TOP_K)) for _ in range(rounds))
    finally:
        torch.set_num_threads(threads)


def rows() -> Iterator[Row]:
    cost = measure()
    case = "the plugin alone: CPU time of a token of a sampled request in the server's event loop; on its own thread"
    both = f"{cost.row:.1f}; {cost.sent:.1f} µs"
    yield Row(case, "", both, f"<= {ROW_LIMIT_US:g} µs together", cost.row + cost.sent <= ROW_LIMIT_US)
    case = f"… of a whole request of {LENGTH} tokens that is not sampled"
    told = f"{cost.unsampled:.1f} µs"
    yield Row(case, "", told, f"<= {REQUEST_LIMIT_US:g} µs", cost.unsampled <= REQUEST_LIMIT_US)
    case = f"`log_softmax` and `topk` of {BATCH} rows of {VOCABULARY:,} ids, which vLLM runs for them, on one core"
    yield Row(case, "", f"{logprobs_ms():.1f} ms", "published only", True)
