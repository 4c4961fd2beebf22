"""What is recorded of a generation in vLLM's API server, with vLLM's own outputs, and how it reaches the admin port."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncGenerator, Iterator
from types import SimpleNamespace
from typing import Any, get_type_hints

import numpy as np
import pytest
from tests.support.captures import INFO, candidates_of, capture
from tests.support.engine_admin import TOKEN, EngineAdmin

from hemostat.engines.messages import MAX_CHILDREN, AnswerMessage
from hemostat.metrics.reasons import Unscored
from hemostat.scoring.conditioning import ConditioningFailure, condition
from hemostat.scoring.intake import captures_from_tap

pytest.importorskip("vllm")
from tests.support.async_llm import PROMPT, Engine, logprobs_of, params
from vllm import SamplingParams
from vllm.logprobs import append_logprobs_for_next_position, create_sample_logprobs
from vllm.sampling_params import RequestOutputKind

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of torch, in what this imports
    from vllm.outputs import CompletionOutput, RequestOutput

from hemostat_engine import answer_sender, answer_tap, numbering
from hemostat_engine.answer_sender import AnswerQueue, AnswerSender
from hemostat_engine.answer_tap import AnswerTap, wrapped
from hemostat_engine.peers import Peers
from hemostat_engine.secrets import Secrets
from hemostat_engine.settings import Settings

ASKS = {"hemostat_tap": "nonce", "hemostat_tap_top": "2"}


class Server:
    """An engine with the tap. seen: the outputs that the server got."""

    def __init__(self, engine: Engine, queue: AnswerQueue | None = None) -> None:
        self.engine = engine
        self.queue = queue or AnswerQueue()
        self.starts = 0
        self.generate = wrapped(Engine.generate, AnswerTap(self.queue, self._start, Secrets()))

    def _start(self) -> None:
        self.starts += 1

    def serve(self, sampling_params: SamplingParams, limit: int = 10**6) -> list[RequestOutput]:
        async def run() -> list[RequestOutput]:
            seen = []
            generator = self.generate(self.engine, PROMPT, sampling_params, "id")
            async for output in generator:
                seen.append(output)
                if len(seen) == limit:
                    await generator.aclose()
                    break
            return seen

        return asyncio.run(run())

    def recorded(self) -> list[dict[str, Any]]:
        return self.queue.take(1 << 30, 1 << 30)


def arrays(answer: dict[str, Any]) -> tuple[list[int], np.ndarray, np.ndarray, list[float]]:
    ids = np.frombuffer(answer["token_ids"], "<i4")
    shape = len(ids), answer["top_k"] + 1
    return (
        ids.tolist(),
        np.frombuffer(answer["candidate_ids"], "<i4").reshape(shape),
        np.frombuffer(answer["candidate_logprobs"], "<f4").reshape(shape),
        np.frombuffer(answer["emitted_logprobs"], "<f4").tolist(),
    )


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY])
def test_ids_and_distribution_of_a_request_are_recorded_and_the_server_sees_none_of_it(kind: RequestOutputKind) -> None:
    pieces = [[3, 8], [4], []] if kind is RequestOutputKind.DELTA else [[3, 8, 4]]
    server = Server(Engine([pieces]))
    own = params(ASKS, output_kind=kind)
    seen = server.serve(own)
    assert [(o.outputs[0].logprobs, o.outputs[0].cumulative_logprob) for o in seen] == [(None, None)] * len(pieces)
    # /v1/responses repeats the parameters' logprobs in its answer.
    assert (own.logprobs, own.flat_logprobs) == (None, False)
    assert server.engine.given[0].logprobs == 2
    (answer,) = server.recorded()
    ids, candidates, logprobs, emitted = arrays(answer)
    assert ids == [3, 8, 4]
    assert candidates.tolist() == [[3, 4, -1], [3, 4, 8], [3, 4, -1]]
    np.testing.assert_array_equal(logprobs, np.float32([[-0.5, -1, -np.inf], [-0.5, -1, -7], [-0.5, -1, -np.inf]]))
    assert emitted == [-0.5, -7.0, -1.0]
    assert np.frombuffer(answer["prompt_ids"], "<i4").tolist() == PROMPT
    wanted = {"nonce": "nonce", "call": 0, "choice": 0, "choices": 1, "finish_reason": "stop"}
    assert {name: answer[name] for name in wanted} == wanted
    assert (server.starts, server.queue.dropped) == (1, 0)


def test_every_choice_is_an_answer_and_a_second_generation_of_the_request_a_call() -> None:
    server = Server(Engine([[[3], [4]], [[8]]]))
    server.serve(params(ASKS, n=2))
    server.serve(params(ASKS, n=2))
    result = [(a["call"], a["choice"], a["choices"], arrays(a)[0]) for a in server.recorded()]
    assert result == [(0, 0, 2, [3, 4]), (0, 1, 2, [8]), (1, 0, 2, [3, 4]), (1, 1, 2, [8])]
    assert server.starts == 1


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("own", [0, 1, 2, 3])
def test_the_clients_own_logprobs_stay_as_it_asked_for_them(own: int, flat: bool) -> None:
    server = Server(Engine([[[3, 8]]]))
    seen = server.serve(params(ASKS, logprobs=own, flat_logprobs=flat))
    assert seen[0].outputs[0].logprobs == logprobs_of([3, 8], own, flat)
    assert (server.engine.given[0].logprobs, server.engine.given[0].flat_logprobs) == (max(own, 2), flat)
    (answer,) = server.recorded()
    assert answer["top_k"] == max(own, 2)
    assert arrays(answer)[1].tolist() == [[3, 4, *[9] * (own == 3), -1], [3, 4, *[9] * (own == 3), 8]]
    assert arrays(answer)[3] == [-0.5, -7.0]


def test_logprobs_of_the_prompt_stay_as_the_server_can_write_them() -> None:
    server = Server(Engine([[[3, 8]]]))
    seen = server.serve(params(ASKS, prompt_logprobs=1))
    assert not server.engine.given[0].flat_logprobs
    assert seen[0].outputs[0].logprobs is None
    (answer,) = server.recorded()
    assert arrays(answer)[1].tolist() == [[3, 4, -1], [3, 4, 8]]


def recorded_masked(server: Server) -> None:
    """Record one token of which a grammar's mask left no other."""
    container = create_sample_logprobs(False)
    append_logprobs_for_next_position(container, [3, 3, 9], [-0.1, -0.1, -np.inf], [None] * 3, 1, 2)
    recording = AnswerTap(server.queue, lambda: None, Secrets()).begin(server.engine, PROMPT, params(ASKS))
    assert recording is not None
    output = CompletionOutput(0, "", [3], None, container, finish_reason="length")
    recording.update(RequestOutput("id", None, PROMPT, None, [output], True))


def test_masked_candidates_are_listed_without_a_probability() -> None:
    server = Server(Engine([[[3]]]))
    recorded_masked(server)
    (answer,) = server.recorded()
    assert arrays(answer)[1].tolist() == [[3, 9, -1]]
    np.testing.assert_array_equal(arrays(answer)[2], np.float32([[-0.1, -np.inf, -np.inf]]))


async def test_a_masked_answer_whose_grammar_is_not_known_is_not_pooled_with_the_others(
    admins: list[EngineAdmin],
) -> None:
    server = Server(Engine([[[3]]]))
    recorded_masked(server)
    await asyncio.to_thread(sender_to(admins[:1], server.queue).send)
    given = admins[0].registry.answers.take("nonce")
    (tapped,) = captures_from_tap(capture(from_tap=True, nonce="nonce"), given, 100)
    with pytest.raises(ConditioningFailure) as failure:
        condition(tapped, candidates_of(tapped), INFO, None)
    assert failure.value.reason is Unscored.GRAMMAR_UNKNOWN


def test_more_than_the_server_allows_is_never_asked_for() -> None:
    server = Server(Engine([[[3]]], max_logprobs=1))
    server.serve(params(ASKS))
    assert server.engine.given[0].logprobs == 1
    unlimited = Server(Engine([[[3]]], max_logprobs=-1))
    unlimited.serve(params(ASKS))
    assert unlimited.engine.given[0].logprobs == 2


@pytest.mark.parametrize(
    ("request_params", "dropped"),
    [
        (params(None), 0),
        (params({"hemostat_tap": "nonce"}), 0),
        (params({"hemostat_tap_top": 3}), 0),
        (params({"hemostat_tap": "nonce", "hemostat_tap_top": 0}), 0),  # refused by vLLM's validation
        (params(ASKS, logprobs=-1), 1),
        (params(ASKS, output_kind=RequestOutputKind.CUMULATIVE), 1),
    ],
)
def test_other_requests_are_not_touched(request_params: SamplingParams, dropped: int) -> None:
    server = Server(Engine([[[3]]]))
    server.serve(request_params)
    assert server.engine.given == [request_params]
    assert server.engine.given[0] is request_params
    assert (server.recorded(), server.queue.dropped) == ([], dropped)


def test_what_cannot_be_recorded_is_dropped_counted_and_still_served(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Engine):
        async def generate(self, *arguments: Any) -> AsyncGenerator[RequestOutput, None]:
            async for output in super().generate(*arguments):
                output.outputs[0].logprobs = type(output.outputs[0].logprobs)()  # older ones cannot be cut to nothing
                yield output

    server = Server(Broken([[[3], [4]]]))
    server.generate = wrapped(Broken.generate, AnswerTap(server.queue, lambda: None, Secrets()))
    seen = server.serve(params(ASKS))
    assert [output.outputs[0].token_ids for output in seen] == [[3], [4]]
    assert [output.outputs[0].logprobs for output in seen] == [None, None]
    assert (server.recorded(), server.queue.dropped) == ([], 1)


@pytest.mark.parametrize("damage", ["emitted", "more"])
def test_logprobs_that_cannot_be_are_dropped_and_counted(damage: str) -> None:
    class Damaged(Engine):
        async def generate(self, *arguments: Any) -> AsyncGenerator[RequestOutput, None]:
            async for output in super().generate(*arguments):
                logprobs = output.outputs[0].logprobs
                if damage == "emitted":
                    logprobs.token_ids[:] = [11, 12, 13]
                else:
                    append = logprobs_of([3], 3, True)
                    output.outputs[0].logprobs = append
                yield output

    server = Server(Damaged([[[8]]]))
    server.generate = wrapped(Damaged.generate, AnswerTap(server.queue, lambda: None, Secrets()))
    assert [output.outputs[0].token_ids for output in server.serve(params(ASKS))] == [[8]]
    assert (server.recorded(), server.queue.dropped) == ([], 1)


def test_the_clients_own_logprobs_that_do_not_fit_its_ids_reach_it_as_they_are() -> None:
    class Longer(Engine):
        async def generate(self, *arguments: Any) -> AsyncGenerator[RequestOutput, None]:
            async for output in super().generate(*arguments):
                output.outputs[0].logprobs = logprobs_of([3, 8], 2, False)
                yield output

    server = Server(Longer([[[3], [4]]]))
    server.generate = wrapped(Longer.generate, AnswerTap(server.queue, lambda: None, Secrets()))
    seen = server.serve(params(ASKS, logprobs=1))
    assert [(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in seen] == [
        (ids, logprobs_of([3, 8], 2, False)) for ids in ([3], [4])
    ]
    assert (server.recorded(), server.queue.dropped) == ([], 1)


def test_generations_that_are_recorded_at_the_same_time_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_tap, "MAX_ACTIVE", 2)
    server = Server(Engine([[[3], [4]]]))

    async def run() -> None:
        begun = [server.generate(server.engine, PROMPT, params(ASKS), "id") for _ in range(4)]
        del begun[0]  # never started
        for generator in begun:
            await anext(generator)
        assert [given.logprobs for given in server.engine.given] == [2, 2, None]
        await begun[0].aclose()
        for generator in begun[1:]:
            assert [output.outputs[0].token_ids async for output in generator] == [[4]]

    asyncio.run(run())
    assert ([answer["call"] for answer in server.recorded()], server.queue.dropped) == ([2], 1)
    for _ in range(3):
        server.serve(params(ASKS))
    assert (len(server.recorded()), server.queue.dropped) == (3, 1)


def test_a_nonce_of_the_clients_own_has_numbers_that_the_admin_port_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert numbering.NUMBERS == MAX_CHILDREN
    monkeypatch.setattr(numbering, "NUMBERS", 2)
    server = Server(Engine([[[3]]]))
    for _ in range(3):
        server.serve(params(ASKS))
    assert [answer["call"] for answer in server.recorded()] == [0, 1, 0]


def test_a_client_that_disconnects_ends_the_generation() -> None:
    server = Server(Engine([[[3], [4], [8]]]))
    assert len(server.serve(params(ASKS), limit=1)) == 1
    assert server.engine.closed
    assert server.recorded() == []


def test_answers_and_the_queue_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(Engine([[[3]]]), AnswerQueue(max_bytes=100))
    for _ in range(3):
        server.serve(params(ASKS))
    taken = server.recorded()
    assert (len(taken), server.queue.dropped) == (2, 1)
    server.serve(params(ASKS))
    assert len(server.recorded()) == 1
    monkeypatch.setattr(answer_tap, "MAX_ANSWER_BYTES", 100)
    long = Server(Engine([[[3]] * 5]))
    assert len(long.serve(params(ASKS))) == 5
    assert (long.recorded(), long.queue.dropped) == ([], 1)


def test_installation_changes_only_the_known_engine_and_needs_an_admin_port(monkeypatch: pytest.MonkeyPatch) -> None:
    class Known:
        async def generate(self, prompt: Any, sampling_params: Any, request_id: str) -> AsyncGenerator[Any, None]:
            yield request_id

    class Other:
        async def generate(self, prompt: Any, params: Any) -> AsyncGenerator[Any, None]:
            yield params

    known, other = Known.generate, Other.generate
    monkeypatch.setitem(answer_tap.sys.modules, answer_tap.ENGINE_MODULE, SimpleNamespace(AsyncLLM=Known))
    answer_tap.install()
    assert Known.generate is known
    monkeypatch.setenv("HEMOSTAT_ADMIN_URL", "http://127.0.0.1:9")
    answer_tap.install()
    once = Known.generate
    answer_tap.install()
    assert once is Known.generate is not known
    monkeypatch.setitem(answer_tap.sys.modules, answer_tap.ENGINE_MODULE, SimpleNamespace(AsyncLLM=Other))
    answer_tap.install()
    assert Other.generate is other


@pytest.fixture
def admins() -> Iterator[list[EngineAdmin]]:
    servers = [EngineAdmin() for _ in range(2)]
    yield servers
    for server in servers:
        server.close()


def sender_to(admins: list[EngineAdmin], queue: AnswerQueue) -> AnswerSender:
    settings = Settings(admin_url=",".join(admin.url for admin in admins), engine_token=TOKEN)
    return AnswerSender(queue, Peers(settings), "boot", Secrets(), pause=lambda _: None)


def test_answers_reach_the_buffer_of_the_admin_port(admins: list[EngineAdmin]) -> None:
    server = Server(Engine([[[3], [8]], [[4]]]))
    server.serve(params(ASKS, n=2))
    sender_to(admins[:1], server.queue).send()
    buffer = admins[0].registry.answers
    assert buffer.complete("nonce", 2)
    assert not buffer.complete("nonce", 3)
    taken = buffer.take("nonce")
    assert [(answer.choice, np.frombuffer(answer.token_ids, "<i4").tolist()) for answer in taken] == [
        (0, [3, 8]),
        (1, [4]),
    ]
    assert buffer.take("nonce") == []
    assert server.queue.dropped == 0


def test_answers_go_to_the_middleware_of_the_request(admins: list[EngineAdmin]) -> None:
    for admin, prefix in zip(admins, ("aa", "bb"), strict=True):
        admin.registry.nonce_prefix = prefix
    server = Server(Engine([[[3]]]))
    sender = sender_to(admins, server.queue)
    for nonce in ("bb-1", "aa-1", "bb-2"):
        server.serve(params({"hemostat_tap": nonce, "hemostat_tap_top": 1}))
        sender.send()
    sizes = [len(admin.sizes["/api/v1/engine/answers"]) for admin in admins]
    # The first goes to both, since it is not known yet whose it is.
    assert sizes == [2, 2]
    result = [
        [nonce for nonce in ("aa-1", "bb-1", "bb-2") if admin.registry.answers.complete(nonce, 1)] for admin in admins
    ]
    assert result == [["aa-1"], ["bb-1", "bb-2"]]
    assert server.queue.dropped == 0


def test_a_message_has_no_more_answers_than_the_admin_port_accepts(
    admins: list[EngineAdmin], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = get_type_hints(AnswerMessage, include_extras=True)["answers"].__metadata__
    assert [limit.max_length for limit in limits] == [answer_sender.MAX_MESSAGE_ANSWERS]
    monkeypatch.setattr(answer_sender, "MAX_MESSAGE_ANSWERS", 2)
    server = Server(Engine([[[3]]]))
    for _ in range(3):
        server.serve(params(ASKS))
    sender = sender_to(admins[:1], server.queue)
    buffer = admins[0].registry.answers
    sender.send()
    assert (buffer.complete("nonce", 2), buffer.complete("nonce", 3)) == (True, False)
    sender.send()
    assert buffer.complete("nonce", 3)


def test_what_cannot_be_sent_is_dropped_and_counted_at_the_admin_port(admins: list[EngineAdmin]) -> None:
    (admin, _) = admins
    server = Server(Engine([[[3]]]))
    sender = sender_to([admin], server.queue)
    admin.status = 503
    server.serve(params(ASKS))
    sender.send()
    assert (server.queue.dropped, len(admin.seen)) == (1, 2)
    admin.status = None
    server.serve(params(ASKS))
    sender.send()
    counts = {sample.labels[0]: sample.value for sample in admin.registry.answers.samples()}
    assert counts == {"received": 1, "dropped": 0, "dropped_at_engine": 1}
