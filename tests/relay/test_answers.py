"""How responses of every form end: the same answer is the same outcome, whatever the route."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import pytest
from tests.support.fake_vllm import FakeVllm
from tests.support.fake_vllm.generation import Generation
from tests.support.fake_vllm.other_forms import MESSAGES, RESPONSES, OtherForm, as_chat

from hemostat.metrics.names import OUTPUT_TOKENS, RESPONSES_FINISHED, STRUCTURED_OUTPUTS
from hemostat.openai.routes import Form
from hemostat.relay import outcomes
from hemostat.relay.answers import parse
from hemostat.relay.outcomes import OutcomeObserver

CHAT = "/v1/chat/completions"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = {
    CHAT: [{"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}],
    RESPONSES: [{"type": "function", "name": "get_weather", "parameters": PARAMETERS}],
    MESSAGES: [{"name": "get_weather", "input_schema": PARAMETERS}],
}
FORM = {CHAT: Form.CHAT, RESPONSES: Form.RESPONSES, MESSAGES: Form.MESSAGES}
ASKS_JSON = {
    CHAT: {"response_format": {"type": "json_schema", "json_schema": {"schema": PARAMETERS}}},
    RESPONSES: {"text": {"format": {"type": "json_schema", "name": "x", "schema": PARAMETERS}}},
    MESSAGES: {"output_config": {"format": {"type": "json_schema", "schema": PARAMETERS}}},
}
FORMS = pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
STREAMS = pytest.mark.parametrize("stream", [False, True])


def body_of(path: str, said: str, limit: int, **more: Any) -> dict[str, Any]:
    name = "input" if path == RESPONSES else "messages"
    limit_name = "max_output_tokens" if path == RESPONSES else "max_tokens"
    return {name: [{"role": "user", "content": f"say: {said}"}], limit_name: limit, "temperature": 0} | more


def response(path: str, body: dict[str, Any], *, stream: bool) -> bytes:
    """As the fake writes it."""
    fake = FakeVllm()
    chat = body if path == CHAT else as_chat(path, body)
    chat = chat | ({"stream_options": {"include_usage": True}} if path == CHAT and stream else {})
    generation = Generation(fake, True, chat, [fake.render(chat["messages"])], chat["max_tokens"], "id")
    form = generation if path == CHAT else OtherForm(generation, path, body)

    async def run() -> bytes:
        if stream:
            return b"".join([event async for event in form.events()])
        return json.dumps(await form.whole()).encode()

    return asyncio.run(run())


def observed(path: str, body: dict[str, Any], *, stream: bool) -> tuple[Counter[Any], dict[str, bool] | None]:
    observer = OutcomeObserver(FORM[path])
    request = json.dumps(body).encode()
    observer.feed_request(request)
    observer.compare(request, json_in_words=False)
    observer.begin_response(stream=stream)
    observer.feed_response(response(path, body, stream=stream))
    result: Counter[Any] = Counter()

    def add(name: str, labels: tuple[str, ...], by: float) -> None:
        result[name, *labels] += by

    return result, observer.finish("treated", add).bad


COMPLETE = {"given_up": False, "broken_off": False}


@FORMS
@STREAMS
def test_a_text(path: str, stream: bool) -> None:
    for limit, reason in ((40, "stop"), (3, "length")):
        counts, bad = observed(path, body_of(path, "Paris.", limit), stream=stream)
        assert counts == {
            (RESPONSES_FINISHED, "treated", reason): 1,
            (OUTPUT_TOKENS, "treated"): min(limit, 7),
        }
        assert bad == COMPLETE | {"loop": False, "cut": reason == "length", "empty": False}


@FORMS
@STREAMS
def test_a_tool_call(path: str, stream: bool) -> None:
    for arguments, is_bad in (('{"city": "Paris"}', False), ('{"town": "Paris"}', True)):
        call = f'<tool_call>\n{{"name": "get_weather", "arguments": {arguments}}}\n</tool_call>'
        counts, bad = observed(path, body_of(path, call, 200, tools=TOOLS[path]), stream=stream)
        assert counts[STRUCTURED_OUTPUTS, "treated", "tool_call", "valid"] == 1
        assert bad is not None
        assert bad["tool_call"] is is_bad
        assert bad["empty"] is False


@FORMS
@STREAMS
def test_json_by_a_schema(path: str, stream: bool) -> None:
    for text, outcome, is_bad in (
        ('{"city": "Paris"}', "valid", False),
        ('{"town": "Paris"}', "valid", True),
        ("Paris", "invalid", True),
    ):
        counts, bad = observed(path, body_of(path, text, 60, **ASKS_JSON[path]), stream=stream)
        assert counts[STRUCTURED_OUTPUTS, "treated", "json", outcome] == 1
        assert bad is not None
        assert bad["json"] is is_bad


@pytest.mark.parametrize(
    ("said", "loops"), [("and then " * 12, True), ("nothing is said twice here, at all, by me", False)]
)
@FORMS
def test_of_a_long_stream_the_end_is_enough(path: str, said: str, loops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcomes, "MAX_WHOLE_BYTES", 10)
    body = body_of(path, said, 200)
    observer = OutcomeObserver(FORM[path])
    observer.compare(json.dumps(body).encode(), json_in_words=False)
    observer.begin_response(stream=True)
    for event in response(path, body, stream=True).split(b"\n\n"):
        observer.feed_response(event + b"\n\n")
    result: Counter[Any] = Counter()
    ended = observer.finish("none", lambda name, labels, by: result.update({(name, *labels): by}))
    assert ended.finish_reasons == ("stop",)
    assert ended.output_tokens == len(said.encode()) + 1
    assert ended.bad == COMPLETE | {"loop": loops, "cut": False, "empty": False}


@FORMS
@STREAMS
def test_what_is_malformed_is_nothing(path: str, stream: bool) -> None:
    whole = response(path, body_of(path, "Paris.", 40), stream=stream)
    for data in (
        whole[: len(whole) // 2],
        whole.replace(b":", b";"),
        b'data: {"choices": 3, "type": 4, "output": 1}\n',
    ):
        parsed = parse(data, FORM[path], stream=stream)
        assert parsed is None or not any(choice.finish_reason for choice in parsed.choices)
