"""The table of the states of a rewritten request's response, and the paths that responses take through it."""

from __future__ import annotations

import json

import pytest
from tests.support.wire import POLICY

from hemostat.interception.intercepted_response import InterceptedResponse
from hemostat.interception.reports import Reports, uncounted
from hemostat.interception.response_state import (
    AWAITED,
    ENDED,
    READ,
    REPEATED,
    TRANSITIONS,
    UNDECIDED,
    WITHHELD,
    ResponseState,
)
from hemostat.metrics.reasons import Unscored
from hemostat.openai.reading import read_request
from hemostat.openai.routes import CHAT, Form
from hemostat.openai.tokens import ResponseTokens

STREAM, JSON, PLAIN = b"text/event-stream", b"application/json", b"identity"
REFUSAL = b'data: {"error": {"message": "no", "code": 400}}\n\n'


def begun() -> tuple[InterceptedResponse, ResponseTokens]:
    body = json.dumps({"model": "fake", "messages": [{"role": "user", "content": "hi"}]}).encode()
    request = read_request(body, form=Form.CHAT, unscorable_models=frozenset(), scorable_models=None)
    reports, tokens = Reports(lambda capture: True, lambda name, labels: None, uncounted), ResponseTokens(8, 1024)
    return InterceptedResponse(reports, POLICY, CHAT, request, tokens, from_tap=False, adapter=None), tokens


PATHS: dict[str, tuple[tuple[int, bytes, bytes], bytes, list[ResponseState]]] = {
    "an answer": ((200, JSON, PLAIN), b"{}", [READ, ENDED]),
    "a stream": ((200, STREAM, PLAIN), b'data: {"id": "x", "choices": []}\n\n', [UNDECIDED, READ, ENDED]),
    "a stream that ends undecided": ((200, STREAM, PLAIN), b"", [UNDECIDED, READ, ENDED]),
    "refused": ((400, JSON, PLAIN), b"{}", [UNDECIDED, REPEATED]),
    "refused in a stream": ((200, STREAM, PLAIN), REFUSAL, [UNDECIDED, REPEATED]),
    "unknown coding": ((200, JSON, b"zstd"), b"\x28\xb5", [WITHHELD, REPEATED]),
    "another error": ((429, JSON, PLAIN), b"{}", [READ, ENDED]),
}


@pytest.mark.parametrize("name", PATHS)
def test_the_paths_that_responses_take(name: str) -> None:
    head, data, expected = PATHS[name]
    response, _ = begun()
    states = [response.state]

    def note() -> None:
        if response.state is not states[-1]:
            # Two transitions at a time: the start is released when the body ends.
            states.extend([READ] if (states[-1], response.state) == (UNDECIDED, ENDED) else [])
            states.append(response.state)

    response.begin(*head)
    note()
    sent = response.feed(data) if data else b""
    note()
    if response.repeat() is not None:
        assert sent == b"", "what went to the client cannot be replaced"
    note()
    response.end()
    note()
    assert states == [AWAITED, *expected]


def test_every_state_is_in_the_table_and_every_path_but_one_is_taken() -> None:
    """That one: the relay does not ask about the end of a response that is withheld."""
    assert set(TRANSITIONS) == set(ResponseState)
    taken = {pair for _, _, states in PATHS.values() for pair in zip([AWAITED, *states], states, strict=False)}
    known = {(before, after) for before, following in TRANSITIONS.items() for after in following}
    assert known - taken == {(WITHHELD, ENDED)}
    assert taken <= known


def test_a_second_answer_passes_unchanged_and_shows_what_was_refused() -> None:
    response, tokens = begun()
    response.begin(400, JSON, PLAIN)
    assert response.repeat() is not None
    response.begin(200, STREAM, PLAIN)
    assert response.feed(b'data: {"id": "x"}\n\n') == b'data: {"id": "x"}\n\n'
    assert (response.end(), response.state) == (b"", REPEATED)
    assert tokens.failure is Unscored.LOGPROBS_REFUSED


def test_what_is_not_in_the_table_is_an_error() -> None:
    response, _ = begun()
    with pytest.raises(AssertionError, match="no transition"):
        response.end()
