"""The name of the model in responses: replaced wherever the body is split, and every other byte as it was."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.support.wire import OTHER_VERSION, VERSION

from hemostat.openai.model_name import MAX_HELD_BYTES, ModelName, without_versions

NAMES = ("base", "org/model-1.5", "grün", 'quo"ted\\', "a" * 200, "日本語")


def restored(pieces: list[bytes], *, name: str = "base", stream: bool = False, error: bool = False) -> bytes:
    names = ModelName(VERSION, name, stream=stream, error=error)
    return b"".join([*map(names.feed, pieces), names.finish()])


def split(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in itertools.pairwise(ends)] or [data]


def compact(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


PIECES = (
    *(VERSION, VERSION[:20], VERSION[20:], f'"model":"{VERSION}"', f'\\"model":"{VERSION}"', '"model"', "model"),
    *('"', "\\", ":", "{", " ", "é", "\r\n", 'data: {"error"', "\n\ndata: "),
)
texts = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
places = st.lists(st.integers(0, 10_000), max_size=12)
white = st.sampled_from(["", " ", "\n  ", "\t", "\r\n "])


@given(text=texts, key=texts, places=places, name=st.sampled_from(NAMES), space=white)
@example(text=VERSION, key="model", places=[], name="base", space="")
@example(text="", key='x"model', places=[4], name="base", space=" ")
def test_an_answer_changes_in_its_member_model_alone(
    text: str, key: str, places: list[int], name: str, space: str
) -> None:
    def body(model: str) -> bytes:
        answer = {"id": "x", "model": model, "choices": [{"index": 0, "message": {"content": text}, "n": {key: 1.5}}]}
        separators = (f",{space}", f"{space}:{space}")
        return json.dumps(answer, ensure_ascii=False, separators=separators).encode()

    assert restored(split(body(VERSION), places), name=name) == body(name)
    assert restored(split(body("other"), places), name=name) == body("other")


@given(
    deltas=st.lists(texts, max_size=5),
    places=places,
    name=st.sampled_from(NAMES),
    end=st.sampled_from([b"\n\n", b"\r\n\r\n"]),
    error=st.none() | texts,
)
def test_a_stream_changes_in_the_member_model_of_its_events_and_in_its_errors(
    deltas: list[str], places: list[int], name: str, end: bytes, error: str | None
) -> None:
    def body(model: str, failure: str | None) -> bytes:
        events = [compact({"id": "x", "model": model, "choices": [{"delta": {"content": text}}]}) for text in deltas]
        if failure is not None:
            events.append(json.dumps({"error": {"message": failure, "code": 500}}).encode())
        return b"".join(b"data: " + event + end for event in [*events, b"[DONE]"])

    wanted = None if error is None else error.replace(VERSION, name)
    assert restored(split(body(VERSION, error), places), name=name, stream=True) == body(name, wanted)


@given(text=texts, places=places)
def test_an_error_changes_wherever_the_version_occurs(text: str, places: list[int]) -> None:
    body = compact({"error": {"message": text, "model": VERSION}})
    assert restored(split(body, places), error=True) == body.replace(VERSION.encode(), b"base")


@pytest.mark.parametrize("stream", [False, True])
def test_every_border_of_one_event(stream: bool) -> None:
    own, text = VERSION.encode(), b'a\\"model\\":\\"' + VERSION.encode()
    event = b'data: {"id":"%b\\"", "model" : "%b"}\r\n\r\n' % (text, own)
    wanted = b'data: {"id":"%b\\"", "model" : "base"}\r\n\r\n' % text
    for first in range(len(event) + 1):
        for second in range(first, len(event) + 1):
            pieces = [event[:first], event[first:second], event[second:]]
            assert restored(pieces, stream=stream) == wanted


def test_whole_events_are_not_held_back() -> None:
    names = ModelName(VERSION, "base", stream=True, error=False)
    assert names.feed(b'data: {"model":"%b","choices":[]}\n\n' % VERSION.encode()).endswith(b"\n\n")
    assert names.feed(b"data: [DONE]\n\n") == b"data: [DONE]\n\n"
    assert names.finish() == b""
    assert names.replaced
    assert not names.other_answered


def test_what_is_held_back_is_bounded() -> None:
    names = ModelName(VERSION, "base", stream=False, error=False)
    data = b'{"model":' + b" " * (MAX_HELD_BYTES + 10)
    assert names.feed(data) == data


@pytest.mark.parametrize(
    ("body", "stream", "other"),
    [
        (b'{"model":"%b"}' % VERSION.encode(), False, False),
        (b'{"model":"base"}', False, True),
        (b'{"model": "%b"}' % OTHER_VERSION.encode(), False, True),
        (b'data: {"error": {"message": "no model", "code": 500}}\n\ndata: [DONE]\n\n', True, False),
        (b'data: {"model":"base","choices":[{"text":"%b"}]}\n\n' % VERSION.encode(), True, True),
        (b"", True, False),
    ],
)
def test_another_model_s_answer_is_noticed(body: bytes, stream: bool, other: bool) -> None:
    for size in range(1, len(body) + 1):
        names = ModelName(VERSION, "base", stream=stream, error=False)
        for start in range(0, len(body), size):
            names.feed(body[start : start + size])
        names.finish()
        assert names.other_answered is other


CARDS = {
    "base": {"id": "base", "parent": None},
    "sql": {"id": "sql", "parent": "base", "root": VERSION},
    "ours": {"id": VERSION, "parent": "base", "permission": [{"id": "modelperm-1", "organization": "*"}]},
    "too": {"id": OTHER_VERSION, "parent": "base"},
    "digest": {"id": "ab" * 16, "parent": None},
}


@given(
    names=st.lists(st.sampled_from(sorted(CARDS)), max_size=6), indent=st.sampled_from([None, 2]), more=st.booleans()
)
def test_the_list_of_models_loses_the_versions(names: list[str], indent: int | None, more: bool) -> None:
    def listed(names: list[str]) -> dict[str, Any]:
        return {"object": "list", "data": [CARDS[name] for name in names]} | ({"more": [1]} if more else {})

    body = json.dumps(listed(names), indent=indent).encode()
    visible = [name for name in names if name not in ("ours", "too")]
    stripped = without_versions(body)
    assert json.loads(stripped) == listed(visible)
    if visible == names:
        assert stripped == body
    if indent is None and visible:
        assert stripped == json.dumps(listed(visible)).encode()


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"data":5}', b'{"data":[1]}', b'{"data":[{"id":3}]}', b'{"data":[', b"\xff"]
)
def test_what_is_no_list_of_models_is_unchanged(body: bytes) -> None:
    assert without_versions(body) == body
