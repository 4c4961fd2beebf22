"""Conversations by a few bytes of a body, compared with what parsing finds."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemostat.openai.conversation_key import conversation_key
from hemostat.openai.reading import read_request
from hemostat.openai.routes import CHAT, FORMS

texts = st.one_of(st.text(), st.sampled_from(['"role": "user"', '\\"', '"}]', '{"messages": [', "]", "\\"]))
contents: st.SearchStrategy[Any] = st.one_of(
    texts, st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": texts}), min_size=1, max_size=3)
)
first_turns = st.tuples(st.lists(texts, max_size=2), contents, st.booleans())


def first(turns: tuple[list[str], Any, bool]) -> list[dict[str, Any]]:
    system, content, role_last = turns
    user = {"content": content, "role": "user"} if role_last else {"role": "user", "content": content}
    return [*({"role": "system", "content": text} for text in system), user]


def encoded(members: dict[str, Any], ascii_only: bool = True) -> bytes:
    return json.dumps(members, ensure_ascii=ascii_only).encode()


@given(first_turns, st.lists(texts, min_size=1, max_size=4), texts, st.booleans())
def test_later_turns_have_the_key_of_the_first(
    begin: tuple[list[str], Any, bool], later: list[str], model: str, ascii_only: bool
) -> None:
    messages = first(begin)
    turns = [{"role": ("assistant", "user")[n % 2], "content": text} for n, text in enumerate(later)]
    one = encoded({"messages": messages, "model": model, "stream": True}, ascii_only)
    two = encoded({"messages": [*messages, *turns], "model": model}, ascii_only)
    assert conversation_key(one) is not None
    assert conversation_key(one) == conversation_key(two)


@given(first_turns, first_turns)
def test_other_conversations_have_other_keys(a: tuple[list[str], Any, bool], b: tuple[list[str], Any, bool]) -> None:
    bodies = [encoded({"messages": first(turns), "model": "m"}) for turns in (a, b)]
    keys = [read_request(body, form=FORMS[CHAT]).conversation_key for body in bodies]
    assert (keys[0] == keys[1]) == (conversation_key(bodies[0]) == conversation_key(bodies[1]))


@pytest.mark.parametrize("separators", [(", ", ": "), (",", ":")])
@pytest.mark.parametrize("members", [{"name": "ann"}, {"images": ["QUJD"]}, {"cache_control": {"type": "ephemeral"}}])
def test_what_stands_behind_the_text_of_a_message_belongs_to_the_conversation(
    members: dict[str, Any], separators: tuple[str, str]
) -> None:
    def body(members: dict[str, Any], *later: dict[str, str]) -> bytes:
        first = {"role": "user", "content": "What is this?", **members}
        return json.dumps({"messages": [first, *later]}, separators=separators).encode()

    key = conversation_key(body(members))
    assert key == conversation_key(body(members, {"role": "assistant", "content": "Nothing."}))
    assert key != conversation_key(body({}))
    assert key != conversation_key(body(dict.fromkeys(members, "other")))


def test_another_member_that_says_user_is_not_a_role() -> None:
    system = (
        b'{"messages": [{"name": "user", "content": "Be brief.", "role": "system"}, {"role": "user", "content": "%d"}]}'
    )
    assert conversation_key(system % 1) != conversation_key(system % 2)


@pytest.mark.parametrize("text", [b"Summarize file %d.", b"%d", b"page_%06d.txt", b"The %d of them" * 20])
def test_numbered_conversations_have_different_keys(text: bytes) -> None:
    """Sums of bytes, as Adler-32's, are equal for many numbers."""
    form = b'{"messages": [{"role": "user", "content": "' + text + b'"}]}'
    count = text.count(b"%")
    assert len({conversation_key(form % ((n,) * count)) for n in range(10_000)}) > 9_990


@given(st.binary(max_size=400))
def test_any_bytes_are_read(body: bytes) -> None:
    conversation_key(body)
    conversation_key(b'{"messages": [' + body)
    conversation_key(b'{"messages": [{"role": "user", ' + body)


BEGINNINGS = {
    "prompt": b'{"prompt": "',
    "message": b'{"messages": [{"role": "user", "content": "',
    "parts": b'{"messages": [{"role": "user", "content": [{"text": "',
}


@pytest.mark.parametrize("unit", [b"a", b'\\"', b"\\\\", b" "], ids=["letters", "quotes", "backslashes", "blanks"])
@pytest.mark.parametrize("begin", BEGINNINGS)
def test_a_long_text_has_the_key_of_its_beginning(begin: str, unit: bytes) -> None:
    """Also where it never ends. It is read once, not from each quotation mark on: that would take seconds."""
    text = BEGINNINGS[begin] + b"%d" + unit * 500_000
    one, two, other = text % 1, text % 1 + b'"}]}', text % 2
    started = time.thread_time()
    assert conversation_key(one) == conversation_key(two)
    assert conversation_key(one) != conversation_key(other)
    assert time.thread_time() - started < 0.5


@pytest.mark.parametrize(("member", "value"), [("prompt", "Once"), ("prompt", [1, 2, 3]), ("input", "Once")])
def test_prompts_have_keys(member: str, value: Any) -> None:
    key = conversation_key(encoded({"model": "m", member: value}))
    assert key is not None
    assert key == conversation_key(encoded({member: value, "seed": 3}))
    assert key != conversation_key(encoded({member: "another"}))
