"""Editing JSON in place, reading requests, recording responses."""

from __future__ import annotations

import json
from typing import Any

import pydantic_core
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemostat.openai.forms.table import FORMATS
from hemostat.openai.json_splice import MALFORMED, JsonObject, encode
from hemostat.openai.logprobs.rows import read_rows
from hemostat.openai.parameters import merged_xargs
from hemostat.openai.reading import read_request
from hemostat.openai.routes import Form
from hemostat.openai.tokens import ResponseTokens
from hemostat_calibration.engine_keys import ACTING_KEYS, MAC_KEY, is_signed
from hemostat_engine.xargs import RequestParameters, parse

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=4), JSON, max_size=5)
SPACE = st.text(" \t\r\n", max_size=2)


@st.composite
def written(draw: st.DrawFn, value: dict[str, Any]) -> bytes:
    """The object as JSON with arbitrary white space and escapes."""
    ascii_only = draw(st.booleans())
    text = draw(SPACE) + "{"
    for number, (key, item) in enumerate(value.items()):
        text += "," if number else ""
        text += draw(SPACE) + json.dumps(key, ensure_ascii=ascii_only) + draw(SPACE) + ":" + draw(SPACE)
        text += json.dumps(item, ensure_ascii=ascii_only) + draw(SPACE)
    return (text + draw(SPACE) + "}" + draw(SPACE)).encode()


@pytest.mark.parametrize("body", [b'{"a":  1, "b": 2}', b'{"a": 1, "b":\t 2}', b'{"a": 1, "b":  2 }'])
def test_further_blanks_behind_a_colon_are_no_duplicate_key(body: bytes) -> None:
    assert [JsonObject(body).raw(key) for key in ("a", "b")] == [b"1", b"2"]


@given(st.data(), OBJECTS, OBJECTS)
def test_an_edit_changes_only_the_named_members(
    data: st.DataObject, value: dict[str, Any], changes: dict[str, Any]
) -> None:
    body = data.draw(written(value))
    edited = JsonObject(body).edit({key: encode(item) for key, item in changes.items()})
    assert json.loads(edited) == value | changes
    back = JsonObject(edited)
    before = JsonObject(body)
    for key in value.keys() - changes.keys():
        assert back.raw(key) == before.raw(key)
    if not changes:
        assert edited == body
    if value and not value.keys() & changes.keys():
        assert edited.startswith(body[: body.rindex(b"}")].rstrip())


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":1,"a":1}',
        b'{"a":1,"b":2,"a":1}',
        b'{"a":12,"a":1}',
        b'{"a":1,"a":12}',
        b'{"a":1,"\\u0061":2}',
        b"[]",
        b"",
        b"{",
        b'{"a":NaN}',
        b"\xff",
        b'{"a":' + b"[" * 100_000,
    ],
)
def test_ambiguous_or_invalid_objects_are_refused(body: bytes) -> None:
    with pytest.raises(MALFORMED):
        JsonObject(body)


MEMBERS = st.lists(st.tuples(st.text(alphabet='ab"\\é', max_size=2), st.integers(0, 20)), max_size=5)


@given(MEMBERS, st.booleans(), st.sampled_from([(",", ":"), (", ", ": ")]))
def test_a_key_that_is_there_twice_is_found_however_the_object_is_written(
    members: list[tuple[str, int]], ascii_only: bool, separators: tuple[str, str]
) -> None:
    between, colon = separators
    text = between.join(json.dumps(key, ensure_ascii=ascii_only) + colon + str(value) for key, value in members)
    body = ("{" + text + "}").encode()
    if len({key for key, _ in members}) < len(members):
        with pytest.raises(MALFORMED):
            JsonObject(body)
    else:
        read = JsonObject(body)
        assert [(key, read.raw(key)) for key in read.names] == [(key, b"%d" % value) for key, value in members]
        assert all(body[read.start_of(key) :].startswith(b"%d" % value) for key, value in members)


@given(st.binary(max_size=60) | st.text(alphabet='{}[]",:\\ au01', max_size=40).map(str.encode))
def test_reading_arbitrary_bytes_raises_only_malformed(data: bytes) -> None:
    for chat in (True, False):
        try:
            read_request(data, form=Form.CHAT if chat else Form.COMPLETIONS)
        except MALFORMED:
            continue


USER = {"role": "user", "content": "hi"}
TEXT_PART = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({}, None),
        ({"messages": [TEXT_PART]}, None),
        ({"n": 1, "logprobs": False, "top_logprobs": 0, "stream_options": None}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"tools": TOOLS}, None),
        ({"tools": TOOLS, "tool_choice": "auto"}, None),
        ({"stream": True, "stream_options": {"include_usage": False, "include_obfuscation": False}}, None),
        ({"messages": [USER, IMAGE]}, "multimodal"),
        ({"n": 2}, None),
        ({"n": 16}, None),
        ({"n": 17}, "n"),
        ({"n": 0}, "invalid"),
        ({"n": True}, "invalid"),
        ({"n": 2, "stream": True, "tools": TOOLS}, "n"),
        ({"n": 2, "stream": True, "tools": TOOLS, "stream_options": {"include_usage": True}}, None),
        ({"n": 2, "tools": TOOLS}, None),
        ({"use_beam_search": True}, "beam_search"),
        ({"response_format": {"type": "json_object"}}, None),
        ({"structured_outputs": {"regex": "a"}}, None),
        ({"guided_json": {}}, "grammar"),
        ({"guided_json": {}, "n": 17}, "grammar"),
        ({"guided_json": {}, "echo": True}, "grammar"),
        ({"tools": TOOLS, "tool_choice": "required"}, None),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}, None),
        ({"structured_outputs": {"regex": "a" * 70_000}}, None),
        ({"logprobs": True}, None),
        ({"logprobs": True, "top_logprobs": 1}, None),
        ({"logprobs": True, "top_logprobs": 2}, "client_logprobs"),
        ({"logprobs": True, "top_logprobs": 1, "return_tokens_as_token_ids": True}, None),
        ({"logprobs": True, "top_logprobs": 2, "return_tokens_as_token_ids": True}, "client_logprobs"),
        ({"logprobs": True, "top_logprobs": True, "return_tokens_as_token_ids": True}, "client_logprobs"),
        ({"logprobs": True, "top_logprobs": -1, "return_tokens_as_token_ids": True}, "client_logprobs"),
        ({"logprobs": True, "top_logprobs": None}, "client_logprobs"),
        ({"logprobs": True, "logprob_token_ids": [1]}, "client_logprobs"),
        ({"logprobs": 1.5}, "client_logprobs"),
        ({"top_logprobs": 2}, "client_logprobs"),
        ({"return_token_ids": True}, None),
        ({"return_tokens_as_token_ids": True}, None),
        ({"return_token_ids": "x"}, "client_logprobs"),
        ({"prompt_logprobs": 0}, None),
        ({"echo": True}, "echo"),
        ({"include_reasoning": False}, "hidden_reasoning"),
        ({"model": "adapter"}, "lora"),
        ({"messages": []}, "invalid"),
        ({"messages": None}, "invalid"),
        ({"messages": "hi"}, "invalid"),
        ({"stream": "yes"}, "invalid"),
        ({"stream": True, "stream_options": {"include_usage": "yes"}}, "invalid"),
        ({"vllm_xargs": [1]}, "invalid"),
    ],
)
def test_why_a_chat_request_cannot_be_scored(more: dict[str, Any], reason: str | None) -> None:
    body = {"model": "m", "messages": [USER]} | more
    assert (
        read_request(json.dumps(body).encode(), form=Form.CHAT, unscorable_models=frozenset({"adapter"})).unscorable
        == reason
    )


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({}, None),
        ({"prompt": [1, 2]}, None),
        ({"prompt": ["a", "b"]}, None),
        ({"prompt": [[1], [2]]}, None),
        ({"prompt": [[1], [2]], "n": 9}, "n"),
        ({"prompt": []}, "invalid"),
        ({"prompt": [1, "a"]}, "invalid"),
        ({"prompt": None}, "invalid"),
        ({"prompt_embeds": "x"}, "multimodal"),
        ({"best_of": 2}, None),
        ({"logprobs": 0}, "client_logprobs"),
        ({"logprobs": 0, "return_tokens_as_token_ids": True}, None),
        ({"logprobs": 1, "return_tokens_as_token_ids": True}, "client_logprobs"),
        ({"logprobs": False, "return_tokens_as_token_ids": True}, "client_logprobs"),
        ({"logprobs": -1, "return_tokens_as_token_ids": True}, "client_logprobs"),
        ({"logprobs": True, "return_tokens_as_token_ids": True}, "client_logprobs"),
        ({"logprobs": 2, "logprob_token_ids": [1], "return_tokens_as_token_ids": True}, "client_logprobs"),
        ({"echo": True}, "echo"),
    ],
)
def test_why_a_completions_request_cannot_be_scored(more: dict[str, Any], reason: str | None) -> None:
    body = {"model": "m", "prompt": "hi"} | more
    assert read_request(json.dumps(body).encode(), form=Form.COMPLETIONS).unscorable == reason


def test_texts_are_escaped_as_vllm_escapes_them() -> None:
    """A client's own logprobs name tokens by texts, which are written anew."""
    for start in range(0, 0x110000, 0x800):
        text = "".join(chr(code) for code in range(start, start + 0x800) if not 0xD800 <= code < 0xE000)
        assert encode(text) == pydantic_core.to_json(text)


def test_every_turn_of_a_conversation_has_the_same_key_and_another_conversation_another() -> None:
    def key(*messages: dict[str, str], model: str = "m") -> bytes | None:
        return read_request(
            json.dumps({"model": model, "messages": messages}).encode(), form=Form.CHAT
        ).conversation_key

    system, first = {"role": "system", "content": "s"}, {"role": "user", "content": "hi"}
    answer, second = {"role": "assistant", "content": "hello"}, {"role": "user", "content": "more"}
    assert key(system, first) == key(system, first, answer, second) is not None
    assert key(system, first) != key(system, second)
    assert key(system, first) != key(first)
    assert key(first) != key(first, model="n")
    assert key(system) == key(system) != key({"role": "system", "content": "t"})


SECRET = "0123456789abcdef" * 2


def test_the_clients_own_xargs_are_kept() -> None:
    def xargs(own: Any) -> Any:
        request = read_request(json.dumps({"messages": [USER], "vllm_xargs": own}).encode(), form=Form.CHAT)
        return json.loads(merged_xargs(request, {"hemostat": "v", "hemostat_tap": "n"}))

    assert xargs(None) == {"hemostat": "v", "hemostat_tap": "n"}
    assert xargs({"mine": [1, 2]}) == {"mine": [1, 2], "hemostat": "v", "hemostat_tap": "n"}
    assert xargs({"hemostat_tap": None, "mine": 1}) == {"hemostat": "v", "hemostat_tap": "n", "mine": 1}


@pytest.mark.parametrize(
    ("own", "sent"),
    [
        ('{"hemostat_tap_top": "2"}', {}),
        (r'{"mine": 1e2, "hemostat_tap_to\u0070": 2}', {"mine": 100}),
        ('{"hemostat_tap_top": "2", "hemostat_tap_top": 3, "hemostat_tap": null}', {}),
    ],
)
def test_a_tap_of_hemostats_has_no_member_of_the_clients(own: str, sent: dict[str, Any]) -> None:
    body = b'{"messages": [{"role": "user", "content": "x"}], "vllm_xargs": %b}' % own.encode()
    request = read_request(body, form=Form.CHAT)
    tap = {"hemostat_tap": "n"}
    assert json.loads(merged_xargs(request, tap)) == sent | tap
    top = tap | {"hemostat_tap_top": "20"}
    assert json.loads(merged_xargs(request, top)) == sent | top
    read = parse(json.loads(merged_xargs(request, top)), signed=True)
    assert read == RequestParameters(None, "n", 20), "as the plugin reads it"


@pytest.mark.parametrize("key", [*ACTING_KEYS, MAC_KEY])
def test_no_key_of_the_clients_is_signed_with_hemostats(key: str) -> None:
    own = {key: "theirs", "mine": 1, "hemostat": "v"}
    request = read_request(json.dumps({"messages": [USER], "vllm_xargs": own}).encode(), form=Form.CHAT)
    assert request.client_acts
    assert json.loads(merged_xargs(request, {}, SECRET)) == {"mine": 1, "hemostat": "v"}
    tap = {"hemostat_tap": "n", "hemostat_tap_top": "20"}
    sent = json.loads(merged_xargs(request, tap, SECRET))
    assert is_signed(sent, [SECRET])
    assert sent.pop(MAC_KEY)
    assert sent == {"mine": 1, "hemostat": "v"} | tap
    assert MAC_KEY not in json.loads(merged_xargs(request, {"hemostat": "v"}, SECRET)), "an open key needs none"


def event(number: int) -> bytes:
    """A chat stream's event as vLLM writes it for a sampled request, K = 2."""
    top = [{"token": f"token_id:{number}", "logprob": -0.5, "bytes": [1]}, {"token": "token_id:9", "logprob": -2.0}]
    choice = {
        "index": 0,
        "delta": {"content": "x"},
        "logprobs": {"content": [top[0] | {"top_logprobs": top}]},
        "finish_reason": None,
        "token_ids": [number],
    }
    return b"data: " + encode({"id": "a", "model": "m", "choices": [choice]}) + b"\n\n"


STREAM = (
    event(1) + event(2) + b'data: {"choices":[],"usage":{"prompt_tokens":0,"completion_tokens":2}}\n\ndata: [DONE]\n\n'
)


@given(st.data(), st.booleans())
def test_a_damaged_response_never_raises_and_is_never_captured(data: st.DataObject, stream: bool) -> None:
    body = STREAM if stream else event(1)[6:-2]
    damaged = bytearray(body)
    for place in data.draw(st.lists(st.integers(0, len(body) - 1), min_size=1, max_size=4)):
        damaged[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    request = read_request(b'{"messages":[{"role":"user","content":"x"}],"stream":true}', form=Form.CHAT)
    tokens = ResponseTokens(2, 100)
    stripper = FORMATS[Form.CHAT].stripper(request, tokens, stream=stream)
    cut = data.draw(st.integers(0, len(damaged)))
    for piece in (damaged[:cut], damaged[cut:]):
        stripper.feed(bytes(piece))
    stripper.finish()
    # Neither form says how it finished, so nothing here is whole, whatever was damaged.
    assert tokens.failure is not None
    assert not tokens.choices


def test_a_row_is_sorted_and_unique_and_contains_the_emitted_token() -> None:
    rows = {
        "tokens": ["token_id:7", "token_id:5"],
        "token_logprobs": [-3.0, -1.0],
        "top_logprobs": [
            {"token_id:7": -3.0, "token_id:1": -0.5, "token_id:2": -1.5},
            {"token_id:5": -1.0, "token_id:1": -1.0},
        ],
    }
    given = [json.dumps(rows).encode()]
    ids, logprobs, emitted = read_rows(Form.COMPLETIONS, given, [7, 5], 2)
    assert ids.tolist() == [[1, 2, 7], [5, 1, -1]]
    assert logprobs.tolist() == [[-0.5, -1.5, -3.0], [-1.0, -1.0, float("-inf")]]
    assert emitted.tolist() == [-3.0, -1.0]
    for others in ([8, 5], [7]):
        with pytest.raises(MALFORMED):
            read_rows(Form.COMPLETIONS, given, others, 2)
