"""Several choices, the client's own logprobs, and requests that only the engine's plugin can report the tokens of."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.captures import candidates_of
from tests.support.fake_vllm import FakeVllm, encode, serving
from tests.support.wire import TOOL_CALL, TOOLS, VERSION, Wire, assert_same_tokens, chat, completion, cut, policy, rows

from hemostat.ipc.messages import MAX_TOP
from hemostat.openai import json_splice
from hemostat.openai.forms.table import FORMATS
from hemostat.openai.logprobs.rows import Row, ordered, read_rows
from hemostat.openai.reading import read_request
from hemostat.openai.requests import Request
from hemostat.openai.routes import CHAT, COMPLETIONS, Form
from hemostat.openai.tokens import ResponseTokens
from hemostat.scoring.intake import captures_from_tap

AS_IDS = {"return_tokens_as_token_ids": True}
SAYS = 'say: Zażółć 日本語\t"quoted" \\ 🎉'
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    # Path, body, number of choices.
    "two choices": (CHAT, chat(n=2, temperature=1.0, seed=3), 2),
    "two choices, tools": (CHAT, chat("say: " + TOOL_CALL, n=2, temperature=1.0, tools=TOOLS, max_tokens=150), 2),
    "two choices, own ids": (CHAT, chat(n=2, temperature=1.0, return_token_ids=True), 2),
    "two choices, own logprobs": (CHAT, chat(SAYS, n=2, temperature=1.0, logprobs=True, max_tokens=60), 2),
    "two choices of a completion": (COMPLETIONS, completion(n=2, temperature=1.0, seed=3), 2),
    "two prompts": (COMPLETIONS, completion(["Hello", "say: other"], max_tokens=30), 2),
    "two prompts of ids": (COMPLETIONS, completion([[1, 2], [3, 4, 5]], max_tokens=30), 2),
    "two choices of two prompts": (COMPLETIONS, completion(["Hello", "Hey"], n=2, temperature=1.0, seed=3), 4),
    "best_of, which is ignored": (COMPLETIONS, completion(best_of=3), 1),
    "own logprobs": (CHAT, chat(SAYS, logprobs=True, max_tokens=60), 1),
    "own logprobs, one": (CHAT, chat(SAYS, logprobs=True, top_logprobs=1, max_tokens=60), 1),
    "own logprobs by ids": (CHAT, chat(SAYS, logprobs=True, top_logprobs=1, max_tokens=60) | AS_IDS, 1),
    "own ids": (CHAT, chat(return_token_ids=True), 1),
    "own ids and tools": (CHAT, chat("say: " + TOOL_CALL, tools=TOOLS, max_tokens=150, return_token_ids=True), 1),
    "own logprobs and tools": (CHAT, chat("say: " + TOOL_CALL, tools=TOOLS, max_tokens=150, logprobs=True), 1),
    "the emitted one's of a completion": (COMPLETIONS, completion(logprobs=0, temperature=1.5) | AS_IDS, 1),
    "own ids of a completion": (COMPLETIONS, completion(return_token_ids=True), 1),
    "logprobs of the prompt": (COMPLETIONS, completion(prompt_logprobs=2), 1),
}
STREAMS: dict[str, dict[str, Any]] = {
    "whole": {},
    "stream": {"stream": True},
    "usage": {"stream": True, "stream_options": {"include_usage": True}},
    "continuous usage": {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
}


@dataclass(frozen=True)
class Recorded:
    """One request, and what the engine answers without Hemostat and with the injected members."""

    request: Request
    plain: bytes
    asked: bytes


class Recordings:
    """Not a list, which hypothesis would print in whole."""

    def __init__(self, all_of_them: list[Recorded]) -> None:
        self.all_of_them = all_of_them

    def __repr__(self) -> str:
        return f"{len(self.all_of_them)} recordings"

    def pick(self, number: int) -> Recorded:
        return self.all_of_them[number % len(self.all_of_them)]


@pytest.fixture(scope="module")
def recorded() -> Recordings:
    result = []
    with serving(FakeVllm(seed=5)) as url, httpx.Client(base_url=url, timeout=20) as client:
        for path, body, choices in CASES.values():
            for more in STREAMS.values():
                form = Form.CHAT if path == CHAT else Form.COMPLETIONS
                request = read_request(json.dumps(body | more).encode(), form=form)
                assert request.choices == choices
                if request.unscorable is not None:
                    continue
                injected = {k: json.loads(v) for k, v in FORMATS[form].injected_members(request, 8).items()}
                plain = client.post(path, json=body | more).content
                asked = client.post(path, json=body | more | injected).content
                # Every generation of the fake has another id.
                result.append(Recorded(request, unnamed(plain), unnamed(asked)))
    return Recordings(result)


def unnamed(body: bytes) -> bytes:
    parts = body.split(b'"id":"')
    kept = [
        b'"' + part.partition(b'"')[2] if n and part[:4] in (b"chat", b"cmpl") else part for n, part in enumerate(parts)
    ]
    return b'"id":"'.join(kept)


@given(st.integers(0, 2**20), st.integers(0, 2**32))
def test_at_any_chunk_boundaries_the_client_gets_what_it_would_without_hemostat(
    recorded: Recordings, which: int, seed: int
) -> None:
    recording = recorded.pick(which)
    stream = recording.request.stream
    tokens = ResponseTokens(8, 2000, recording.request.choices, recording.request.prompts)
    stripper = FORMATS[recording.request.form].stripper(recording.request, tokens, stream=stream)
    pieces = cut(recording.asked, random.Random(seed))
    assert b"".join(map(stripper.feed, pieces)) + stripper.finish() == recording.plain
    assert tokens.failure is None
    assert len(tokens.choices) == recording.request.choices
    for choice in tokens.choices:
        assert choice.prompt_ids
        rows = read_rows(recording.request.form, choice.logprobs, choice.output_ids, 8)
        assert len(rows.ids) == len(choice.output_ids) == len(rows.emitted)


@given(st.integers(0, 2**20), st.integers(0, 2**32))
def test_an_observer_passes_on_every_byte(recorded: Recordings, which: int, seed: int) -> None:
    recording = recorded.pick(which)
    tokens = ResponseTokens(8, 2000, recording.request.choices, recording.request.prompts)
    observer = FORMATS[recording.request.form].observer(recording.request, tokens, stream=recording.request.stream)
    pieces = cut(recording.plain, random.Random(seed))
    assert b"".join(map(observer.feed, pieces)) + observer.finish() == recording.plain
    assert tokens.failure is None
    assert tokens.model == "fake"
    assert all(choice.finish_reason for choice in tokens.choices)


@given(st.data())
def test_a_damaged_response_is_passed_on_and_never_raises(recorded: Recordings, data: st.DataObject) -> None:
    recording = recorded.pick(data.draw(st.integers(0, 2**20)))
    damaged = bytearray(recording.asked)
    for place in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=4)):
        damaged[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    tokens = ResponseTokens(8, 2000, recording.request.choices, recording.request.prompts)
    stripper = FORMATS[recording.request.form].stripper(recording.request, tokens, stream=recording.request.stream)
    cut = data.draw(st.integers(0, len(damaged)))
    for piece in (damaged[:cut], damaged[cut:]):
        stripper.feed(bytes(piece))
    stripper.finish()
    assert tokens.failure is None or not tokens.choices


@pytest.mark.parametrize("option", STREAMS)
@pytest.mark.parametrize("case", CASES)
def test_every_choice_is_a_capture_of_one_conversation(wire: Wire, fake: FakeVllm, case: str, option: str) -> None:
    path, body, choices = CASES[case]
    body = body | STREAMS[option]
    wire.interceptor.policy = policy(scoring=False)
    plain = wire.send(path, body)
    wire.interceptor.policy = policy()
    sampled = wire.send(path, body, splits=random.Random(1))
    assert sampled.body == plain.body
    if case == "two choices, tools" and option == "stream":
        # Without usage nothing shows that the parser left out no ids.
        assert sampled.sent == plain.sent
        assert wire.shadow("skipped", "n") == wire.counts.total() == 1
        return
    assert wire.shadow("shadowed") == choices == wire.counts.total()
    assert [capture.choice for capture in wire.captures] == list(range(choices))
    assert {capture.choices for capture in wire.captures} == {choices}
    assert len({(capture.request_id, capture.conversation, capture.kind) for capture in wire.captures}) == 1
    asked = body.get("prompt", "")
    for number, capture in enumerate(wire.captures):
        prompt, output, ids, logprobs, emitted = rows(capture)
        if path == COMPLETIONS:
            own = asked[number * len(asked) // choices] if isinstance(asked, list) else asked
            assert prompt == (encode(own) if isinstance(own, str) else own)
        for position, token in enumerate(output):
            truth = fake.logprobs(prompt + output[:position])
            row = ids[position][ids[position] >= 0]
            assert len(row) >= 8
            assert token in row
            np.testing.assert_array_equal(logprobs[position][: len(row)], truth[row].astype(np.float32))
            assert emitted[position] == np.float32(truth[token])
            assert set(np.argsort(-truth, kind="stable")[:7]) <= set(row.tolist())
    if case == "two choices":
        assert wire.captures[0].output_token_ids != wire.captures[1].output_token_ids


def test_usage_counts_over_all_choices(wire: Wire, fake: FakeVllm) -> None:
    fake.lose_tool_tokens = True
    body = chat(
        "say: " + TOOL_CALL,
        n=2,
        temperature=1.0,
        tools=TOOLS,
        max_tokens=150,
        stream=True,
        stream_options={"include_usage": True},
    )
    wire.send(CHAT, body)
    assert wire.shadow("skipped", "tool_tokens_lost") == wire.counts.total() == 1


def test_a_choice_that_is_too_long_fails_them_all(wire: Wire) -> None:
    wire.interceptor.policy = policy(shadow_max_tokens=30)
    wire.send(COMPLETIONS, completion(["x", "x" * 25], max_tokens=12))
    assert wire.shadow("skipped", "too_long") == wire.counts.total() == 1


def test_the_emitted_token_stays_where_the_client_asked_for_more_than_is_recorded() -> None:
    values = [-5.0, -1.0, -2.0, -3.0, -4.0]
    assert ordered(Row(9, -5.0, [9, 1, 2, 3, 4], values), top_k=2) == {1: -1.0, 2: -2.0, 9: -5.0}
    assert ordered(Row(1, -1.0, [1, 2, 3, 4], values[1:]), top_k=2) == {1: -1.0, 2: -2.0, 3: -3.0}


# --- from the engine's tap --------------------------------------------------------------------------------------------

BY_TAP: dict[str, tuple[str, str, dict[str, Any]]] = {
    # The reason without the plugin, path, body.
    "logprobs as texts": ("client_logprobs", CHAT, chat(logprobs=True, top_logprobs=3)),
    "logprobs of a completion as texts": ("client_logprobs", COMPLETIONS, completion(logprobs=3)),
    "alternatives by ids": ("client_logprobs", CHAT, chat(logprobs=True, top_logprobs=3) | AS_IDS),
    "alternatives of a completion by ids": ("client_logprobs", COMPLETIONS, completion(logprobs=3) | AS_IDS),
    "an echo": ("echo", COMPLETIONS, completion(echo=True)),
    "hidden reasoning": ("hidden_reasoning", CHAT, chat(include_reasoning=False)),
    "two choices with tools": ("n", CHAT, chat(n=2, temperature=1.0, tools=TOOLS, stream=True)),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", BY_TAP)
def test_what_the_response_cannot_tell_is_asked_of_the_plugin(
    wire: Wire, fake: FakeVllm, case: str, stream: bool
) -> None:
    reason, path, body = BY_TAP[case]
    body = {"stream": stream} | body
    wire.interceptor.policy = policy(tap=True)
    plain = wire.send(path, body)
    assert plain.sent == json_splice.encode(body)
    assert wire.shadow("skipped", reason) == wire.counts.total() == 1
    wire.interceptor.policy = policy(tap=True, tap_tokens=True)
    sampled = wire.send(path, body, splits=random.Random(1))
    assert sampled.body == plain.body
    assert fake.requests[-1]["vllm_xargs"] == {"hemostat_tap": "nonce", "hemostat_tap_top": "8"}
    assert {key: value for key, value in fake.requests[-1].items() if key != "vllm_xargs"} == body
    [capture] = wire.captures
    assert (capture.from_tap, capture.nonce, capture.choice) == (True, "nonce", 0)
    assert capture.choices == body.get("n", 1)
    assert capture.output_token_ids == capture.prompt_token_ids == b""
    assert (capture.model, bool(capture.finish_reason)) == ("fake", True)
    assert (capture.generated > 0) == (not body["stream"])
    # A client's own tap is removed.
    wire.send(path, body | {"vllm_xargs": {"hemostat_tap": "mine"}})
    assert fake.requests[-1]["vllm_xargs"] == {"hemostat_tap": "nonce", "hemostat_tap_top": "8"}
    assert wire.shadow("skipped", reason) == 1


def test_once_tool_tokens_were_lost_the_plugin_is_asked(wire: Wire, fake: FakeVllm) -> None:
    fake.lose_tool_tokens = True
    wire.interceptor.policy = policy(tap=True, tap_tokens=True)
    body = chat("say: " + TOOL_CALL, tools=TOOLS, max_tokens=150, stream=True)
    first = wire.send(CHAT, body)
    assert wire.shadow("skipped", "tool_tokens_lost") == wire.counts.total() == 1
    assert wire.send(CHAT, body).body == first.body
    assert fake.requests[-1]["vllm_xargs"] == {"hemostat_tap": "nonce", "hemostat_tap_top": "8"}
    assert "return_token_ids" not in fake.requests[-1]
    assert [capture.from_tap for capture in wire.captures] == [True]
    # Other requests are read as before, and so are these from the next policy on.
    wire.send(CHAT, chat(stream=True))
    wire.interceptor.policy = policy(tap=True, tap_tokens=True, generation=2)
    wire.send(CHAT, body)
    assert [capture.from_tap for capture in wire.captures] == [True, False]
    assert wire.shadow("skipped", "tool_tokens_lost") == 2


def test_an_error_is_no_answer_of_the_tap(wire: Wire, fake: FakeVllm) -> None:
    wire.interceptor.policy = policy(tap=True, tap_tokens=True)
    fake.error_after = 2
    wire.send(CHAT, chat(logprobs=True, top_logprobs=3, stream=True))
    assert wire.shadow("skipped", "upstream_error") == wire.counts.total() == 1
    fake.error_after, fake.die_after = None, 2
    wire.send(CHAT, chat(logprobs=True, top_logprobs=3, stream=True))
    assert wire.shadow("skipped", "incomplete") == 1


def test_choices_are_tapped_only_by_a_plugin_that_knows_them(wire: Wire, fake: FakeVllm) -> None:
    wire.interceptor.policy = policy(tap=True)
    wire.send(CHAT, chat(n=2, temperature=1.0))
    assert "vllm_xargs" not in fake.requests[-1]
    wire.interceptor.policy = policy(tap=True, tap_tokens=True)
    wire.send(CHAT, chat(n=2, temperature=1.0))
    assert fake.requests[-1]["vllm_xargs"] == {"hemostat_tap": "nonce"}
    assert [capture.nonce for capture in wire.captures] == ["", "", "nonce", "nonce"]


@pytest.mark.parametrize("treat_unjudged", [False, True])
@pytest.mark.parametrize("control", [0.0, 1.0])
def test_choices_are_judged_in_both_arms_or_in_none(
    wire: Wire, fake: FakeVllm, control: float, treat_unjudged: bool
) -> None:
    """A plugin that reports no ids does not tell which profile the choices got, so the treated arm has no scores."""
    arms: dict[str, Any] = {"served": VERSION, "control_fraction": control, "treat_unjudged": treat_unjudged}
    fake.adapters = (VERSION,)
    body = chat(n=2, temperature=1.0)
    wire.interceptor.policy = policy(tap=True, **arms)
    wire.send(CHAT, body)
    assert not wire.captures
    assert wire.shadow("skipped", "n") == 1
    assert ("vllm_xargs" in fake.requests[-1]) == (treat_unjudged and control == 0.0)
    # One choice, and whatever the plugin's report is not needed for, is scored as before.
    for sent, more in (
        (body | {"n": 1}, {"tap": True}),
        (body, {"tap": True, "tap_tokens": True}),
        (
            body,
            {
                "tap": True,
                "adapters": frozenset({VERSION}),
                "base_models": frozenset({"fake"}),
                "answered_name": "fake",
            },
        ),
    ):
        wire.captures.clear()
        wire.interceptor.policy = policy(**arms | more)
        wire.send(CHAT, sent)
        assert [capture.arm for capture in wire.captures] == ["control" if control else "treated"] * sent["n"]


# --- by either way ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", STREAMS)
@pytest.mark.parametrize("case", CASES)
def test_both_ways_tell_the_same_tokens(wire: Wire, fake: FakeVllm, case: str, option: str) -> None:
    fake.plugin = True
    path, body, choices = CASES[case]
    body = body | STREAMS[option]
    by_response = policy(tap=True, tap_tokens=True)
    wire.interceptor.policy = by_response
    read = wire.send(path, body)
    in_response = wire.captures[:]
    if case == "two choices, tools" and option == "stream":
        return  # it is asked of the plugin by either policy
    wire.captures.clear()
    wire.interceptor.policy = msgspec.structs.replace(by_response, prefer_plugin=True)
    passed_on = wire.send(path, body, splits=random.Random(1))
    assert passed_on.body == read.body
    asked = fake.requests[-1]
    assert asked.pop("vllm_xargs") == {"hemostat_tap": "nonce", "hemostat_tap_top": "8"}
    assert asked == body, "nothing else is added"
    [capture] = wire.captures
    assert (capture.from_tap, capture.also_in_response) == (True, True)
    result = captures_from_tap(capture, fake.handed_out, 1024)
    assert len(result) == len(in_response) == choices
    for ours, theirs in zip(in_response, result, strict=True):
        assert_same_tokens(ours, theirs)


def test_what_only_the_response_can_tell_is_asked_there(wire: Wire, fake: FakeVllm) -> None:
    """More candidates than the plugin hands out."""
    fake.max_logprobs = 200
    wire.interceptor.policy = policy(tap=True, tap_tokens=True, prefer_plugin=True, shadow_top_k=MAX_TOP + 1)
    wire.send(CHAT, chat())
    assert [capture.from_tap for capture in wire.captures] == [False]
    # The response of this one cannot: it is scored with fewer.
    wire.send(CHAT, chat(logprobs=True, top_logprobs=3))
    assert fake.requests[-1]["vllm_xargs"]["hemostat_tap_top"] == str(MAX_TOP)


@pytest.mark.parametrize("own", ["2", 1, 128, "x"])
def test_a_client_does_not_choose_how_many_candidates_are_measured(wire: Wire, fake: FakeVllm, own: Any) -> None:
    fake.plugin = True
    body = chat(vllm_xargs={"hemostat_tap_top": own})
    for prefer_plugin, top in ((True, {"hemostat_tap_top": "8"}), (False, {})):
        wire.interceptor.policy = policy(tap=True, tap_tokens=True, prefer_plugin=prefer_plugin)
        assert wire.send(CHAT, body).status == 200
        assert fake.requests[-1]["vllm_xargs"] == {"hemostat_tap": "nonce"} | top
    [completed] = captures_from_tap(wire.captures[0], fake.handed_out, 1024)
    assert candidates_of(completed).ids.shape == (12, 9)
    # Neither are they the client's own where it names a tap as well.
    wire.send(CHAT, chat(vllm_xargs={"hemostat_tap": "mine", "hemostat_tap_top": "2"}))
    assert fake.requests[-1]["vllm_xargs"] == {"hemostat_tap": "nonce"}


def test_a_server_that_allows_fewer_logprobs_hands_out_fewer(wire: Wire, fake: FakeVllm) -> None:
    fake.plugin, fake.max_logprobs = True, 5
    wire.interceptor.policy = policy(tap=True, tap_tokens=True, prefer_plugin=True)
    answer = wire.send(CHAT, chat())
    assert (answer.status, answer.replayed, wire.shadow("shadowed")) == (200, False, 1)
    [completed] = captures_from_tap(wire.captures[0], fake.handed_out, 1024)
    assert candidates_of(completed).ids.shape == (12, 6)


@pytest.mark.parametrize("pieces", ["events", "two at a time"])
def test_an_observer_that_skips_empty_events_finds_the_same(recorded: Recordings, pieces: str) -> None:
    """The oracle gets no whole event at a time."""
    for recording in recorded.all_of_them:
        if not recording.request.stream:
            continue
        events = [event + b"\n\n" for event in recording.plain.split(b"\n\n") if event]
        if pieces == "two at a time":
            events = [b"".join(events[at : at + 2]) for at in range(0, len(events), 2)]
        result = []
        for parts in (events, [recording.plain[at : at + 17] for at in range(0, len(recording.plain), 17)]):
            tokens = ResponseTokens(8, 2000, recording.request.choices, recording.request.prompts)
            observer = FORMATS[recording.request.form].observer(recording.request, tokens, stream=True)
            assert b"".join(map(observer.feed, parts)) + observer.finish() == recording.plain
            result.append(tokens)
        assert result[0] == result[1]
