"""The kind of a request: a bounded name, made from what the client sent, whatever that is."""

from __future__ import annotations

import itertools
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemostat.openai.json_splice import MALFORMED
from hemostat.openai.kinds import EDGE_BYTES, MAX_NAME_CHARACTERS, kind_name
from hemostat.openai.reading import read_request
from hemostat.openai.routes import Form

TOOLS = [{"type": "function", "function": {"name": "f"}}]
OUTPUTS = {"text", "json", "tools", "grammar"}
DECODINGS = {"greedy", "sampled", "cut"}
SUBJECTS = {"", "code", "cyrillic", "cjk", "korean", "arabic", "hebrew", "greek", "devanagari", "thai"}
FLAGS = [" ".join(chosen) for n in range(4) for chosen in itertools.combinations(("reply", "long", "brief"), n)]
NAMES = {
    " ".join(" ".join(parts).split())
    for parts in itertools.product(("chat", "completions"), OUTPUTS, DECODINGS, SUBJECTS, FLAGS)
}
"""Every kind of a server with one model and no labels."""


def named(body: dict[str, Any], *, chat: bool = True, label: str = "", several: bool = False) -> str:
    data = msgspec.json.encode({"model": "m"} | body)
    return kind_name(read_request(data, form=Form.CHAT if chat else Form.COMPLETIONS), label, several_models=several)


def asking(*texts: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]} | more


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (asking("Hello"), "chat text sampled"),
        (asking("Hello", temperature=0), "chat text greedy"),
        (asking("Hello", temperature=0, top_p=0.5), "chat text greedy"),
        (asking("Hello", temperature=0.7, top_p=0.9), "chat text cut"),
        (asking("Hello", top_p=1, top_k=0, min_p=0), "chat text sampled"),
        (asking("Hello", top_k=-1), "chat text sampled"),
        (asking("Hello", top_k=40), "chat text cut"),
        (asking("Hello", min_p=0.05), "chat text cut"),
        (asking("Hello", "Hi!", "More"), "chat text sampled reply"),
        (asking("Hello", max_tokens=32), "chat text sampled brief"),
        (asking("Hello", max_tokens=33), "chat text sampled"),
        (asking("Hello", max_tokens=500, max_completion_tokens=5), "chat text sampled brief"),
        (asking("x" * 5000), "chat text sampled long"),
        (asking("x" * 2500, "y" * 2500, "z"), "chat text sampled reply long"),
        (asking("Extract the names as JSON."), "chat json sampled"),
        (asking("Extract the names:\nJSON only"), "chat json sampled"),
        (asking("Jsonnet and my_json2 are words"), "chat text sampled"),
        (asking("Answer in JSON.", "{}", "And Rome?"), "chat json sampled reply"),
        (asking("Names as JSON: " + "Anna, " * 1000), "chat json sampled long"),
        (asking("Anna, " * 1000 + " as JSON"), "chat json sampled long"),
        (asking("What is the weather? As JSON", tools=TOOLS), "chat tools sampled"),
        (asking("What is the weather?", tools=TOOLS, tool_choice="none"), "chat text sampled"),
        (asking("What is the weather?", tools=[]), "chat text sampled"),
        (asking("What?", tools=TOOLS, tool_choice="required"), "chat grammar sampled"),
        (asking("What?", response_format={"type": "json_object"}), "chat grammar sampled"),
        (asking("What?", tools=TOOLS, parallel_tool_calls=False), "chat grammar sampled"),
        (asking("What?", guided_json={}), "chat grammar sampled"),
        (asking("Write a function in Python that adds."), "chat text sampled code"),
        (asking("Fix this:\n```\nx = 1\n```"), "chat text sampled code"),
        (asking("A python is a snake."), "chat text sampled"),
        (asking("Describe the function of the heart."), "chat text sampled"),
        (asking("Как столица Франции?"), "chat text sampled cyrillic"),
        (asking("日本の首都はどこですか"), "chat text sampled cjk"),
        (asking("中国的首都是哪里？"), "chat text sampled cjk"),
        (asking("한국의 수도는 어디입니까"), "chat text sampled korean"),
        (asking("ما هي عاصمة فرنسا"), "chat text sampled arabic"),
        (asking("Où est la bibliothèque ? Ça va être l'été."), "chat text sampled"),
        (asking("Translate to Russian: the word молоко stands here alone among many others"), "chat text sampled"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "As JSON"}]}]}, "chat json sampled"),
        (
            {"messages": [{"role": "system", "content": "Reply in JSON"}, *asking("Hi")["messages"]]},
            "chat json sampled",
        ),
        ({"messages": []}, "chat text sampled"),
        ({"messages": 3}, "chat text sampled"),
    ],
)
def test_kinds_of_chats(body: dict[str, Any], kind: str) -> None:
    assert named(body) == kind
    escaped = json.dumps({"model": "m"} | body, ensure_ascii=True).encode()
    assert kind_name(read_request(escaped, form=Form.CHAT), "", several_models=False) == kind, "also with escapes"
    assert kind in NAMES


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"prompt": "Once upon a time"}, "completions text sampled"),
        ({"prompt": "Extract as JSON:"}, "completions json sampled"),
        ({"prompt": [1] * 1000}, "completions text sampled"),
        ({"prompt": [1] * 1001, "max_tokens": 1}, "completions text sampled long brief"),
        ({"prompt": "Привет, мир"}, "completions text sampled cyrillic"),
        ({"prompt": "def add(a, b):"}, "completions text sampled code"),
        ({}, "completions text sampled"),
    ],
)
def test_kinds_of_completions(body: dict[str, Any], kind: str) -> None:
    assert named(body, chat=False) == kind
    assert kind in NAMES


def test_a_label_and_a_model_are_part_of_the_name() -> None:
    assert named(asking("Hi"), label="batch") == "chat label batch text sampled"
    assert named(asking("Hi"), several=True) == "chat model m text sampled"
    assert named(asking("Hi", model="my own model"), several=True) == "chat model my_own_model text sampled"
    long = named(asking("Hi", model="x" * 1000), several=True, label="batch")
    assert long == f"chat model {'x' * MAX_NAME_CHARACTERS} label batch text sampled"


def test_only_the_beginning_and_the_end_of_a_text_are_looked_at() -> None:
    edge = "x " * EDGE_BYTES
    assert named(asking(edge + " as JSON " + edge)) == "chat text sampled"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
MEMBERS = (
    *("messages", "prompt", "temperature", "top_p", "top_k", "min_p", "max_tokens", "max_completion_tokens"),
    *("tools", "tool_choice", "response_format", "n", "model", "stream"),
)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"])}) | VALUES
CONTENT = st.text(max_size=300) | VALUES
MESSAGES = st.lists(
    st.builds(
        lambda message, content: {**message, "content": content} if isinstance(message, dict) else message,
        MESSAGE,
        CONTENT,
    ),
    max_size=4,
)
BODIES = st.dictionaries(st.sampled_from(MEMBERS), VALUES, max_size=8) | st.fixed_dictionaries(
    {"messages": MESSAGES}, optional=dict.fromkeys(MEMBERS[1:], VALUES)
)


@given(BODIES, st.booleans(), st.booleans())
def test_whatever_a_client_sends_has_one_of_the_known_names(body: dict[str, Any], chat: bool, ascii_only: bool) -> None:
    data = json.dumps(body, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    try:
        request = read_request(data, form=Form.CHAT if chat else Form.COMPLETIONS)
    except MALFORMED:
        return
    assert kind_name(request, "", several_models=False) in NAMES


@given(st.binary(max_size=200), st.sampled_from(["messages", "prompt", "top_p", "tool_choice"]), st.booleans())
def test_damaged_bytes_have_a_name_too(damage: bytes, member: str, chat: bool) -> None:
    content = b'[{"role":"user","content":"' + damage + b'"}]' if member == "messages" else b'"' + damage + b'"'
    try:
        request = read_request(
            b'{"model":"m","' + member.encode() + b'":' + content + b"}", form=Form.CHAT if chat else Form.COMPLETIONS
        )
    except MALFORMED:
        return
    assert kind_name(request, "", several_models=False) in NAMES


@pytest.mark.parametrize("text", ["\\" * 3000, '"' * 3000, "\n" * 3000, "\u0000" * 3000, "🎉" * 3000, "д" * 3000])
def test_texts_of_escapes_are_cut_anywhere(text: str) -> None:
    for length in (1, 749, 750, 751, 1499, 1500, 1501, 3000):
        for escape in (True, False):
            data = json.dumps({"model": "m"} | asking(text[:length]), ensure_ascii=escape).encode()
            assert kind_name(read_request(data, form=Form.CHAT), "", several_models=False) in NAMES
