"""The kind of traffic that a request belongs to: a name that is made from the request alone, before it is answered.

A profile serves a kind only on evidence in that kind, so a kind should hold requests that the compressed model answers
alike. The name's parts, in this order and joined by spaces; those after the third only where they apply:

    chat | completions
    model NAME      where the server has several models that can be scored
    label NAME      X-Hemostat-Label
    text | json | tools | structured
                    json: the prompt asks for it in words; tools: tools are offered; structured: a grammar is enforced
    greedy | sampled | cut
                    cut: top_p, top_k or min_p leave out tokens
    code | a script the last message of the user is about code, or is written in another script than Latin
    reply           the model has answered before in this conversation
    long            the prompt has more than LONG_CHARACTERS characters
    brief           at most BRIEF_TOKENS tokens may be generated

Of a text, only its first and last EDGE_BYTES bytes are looked at, by searches of constant strings, so that a name costs
some microseconds whatever a client sends. The words decide which requests are compared with each other, and nothing
else: where they classify a text wrongly, it is judged among others than it could have been.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from hemostat.openai.json_splice import MALFORMED
from hemostat.openai.requests import Message, Request, Unscorable

LONG_CHARACTERS = 4_000
LONG_TOKENS = 1_000
"""The same for a prompt of token ids."""
BRIEF_TOKENS = 32
EDGE_BYTES = 1_000
MAX_NAME_CHARACTERS = 64
"""Of a model's name."""
MIN_SCRIPT_SHARE = 0.25
"""Of a text's characters, for the text to count as written in a script."""

_MAX_BYTES_PER_CHARACTER = 12
"""A JSON string's longest character: an escaped pair of surrogates."""
_STRUCTURED = frozenset({Unscorable.STRUCTURED_OUTPUT, Unscorable.FORCED_TOOL})
_CODE_SIGNS = ("```", "def ", "#include", "public static", "std::", "console.log", "import numpy", "</div>", "=> {")
"""Any of these is enough."""


def _word(word: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![a-z0-9]){re.escape(word)}(?![a-z0-9])")


_LANGUAGES = {
    name: _word(name)
    for name in (
        *("python", "javascript", "typescript", "java", "c++", "c#", "rust", "golang", "kotlin", "php", "ruby"),
        *("sql", "bash", "html", "css", "regex", "haskell", "perl", "pytorch"),
    )
}
_JSON = {"json": _word("json")}
_CODE_WORDS = {
    name: _word(name)
    for name in ("code", "function", "script", "program", "class", "implement", "method", "query", "compile", "debug")
}
"""One of these beside a language."""


def kind_name(request: Request, label: str, *, several_models: bool) -> str:
    """The full name of the request's kind; never raises.

    label: of X-Hemostat-Label, "" without it. several_models: the server has more than one that can be scored.
    """
    parts = ["chat" if request.chat else "completions"]
    if several_models and request.model:
        parts.append("model " + "_".join(request.model.split())[:MAX_NAME_CHARACTERS])
    if label:
        parts.append(f"label {label}")
    messages = request.messages
    if messages:
        last = next((m for m in reversed(messages) if m.role == "user"), messages[-1])
        asked = _edges(bytes(last.content))
        # JSON is mostly asked for where the conversation begins, and once.
        first = [_edges(bytes(m.content)) for m in messages[:2] if m is not last]
        prompt = [bytes(m.content) for m in messages]
    else:
        raw = b"" if request.chat else request.body.raw("prompt")
        text = raw if raw.startswith(b'"') else b""
        asked, first, prompt = _edges(text), [], [text]
    parts += [_output(request, asked, first), _decoding(request)]
    subject = "code" if _about_code(asked) else _script(asked)
    if subject:
        parts.append(subject)
    if messages and _answered(messages):
        parts.append("reply")
    if request.min_prompt_tokens > LONG_TOKENS or _is_long(prompt):
        parts.append("long")
    if _is_brief(request):
        parts.append("brief")
    return " ".join(parts)


def _edges(raw: bytes) -> str:
    """Of a JSON value's bytes, the text at its beginning and end, in lower case, with the usual escapes decoded."""
    if len(raw) > 2 * EDGE_BYTES:
        raw = raw[:EDGE_BYTES] + b" " + raw[-EDGE_BYTES:]
    if b"\\" not in raw:
        return raw.decode("utf-8", "ignore").lower()
    # A client escapes either all characters that are not ASCII, or none.
    text = raw.decode("raw_unicode_escape" if raw.isascii() and b"\\u" in raw else "utf-8", "ignore")
    return text.replace("\\n", "\n").replace("\\t", "\t").replace('\\"', '"').lower()


def _output(request: Request, asked: str, first: list[str]) -> str:
    if request.unscorable in _STRUCTURED:
        return "structured"
    if request.tools and request.body.raw("tools") != b"[]" and _given(request, "tool_choice") != "none":
        return "tools"
    return "json" if any(_names_one(text, _JSON) for text in (asked, *first)) else "text"


def _decoding(request: Request) -> str:
    """By what the client gives: what it leaves out is the server's default, equal for all of its requests."""
    if _given(request, "temperature") == 0:
        return "greedy"
    cut = _number(request, "top_p", 1.0) < 1.0 or _number(request, "top_k", 0) > 0 or _number(request, "min_p", 0) > 0
    return "cut" if cut else "sampled"


def _given(request: Request, key: str) -> Any:
    """The member's value; None where it is absent or malformed, which vLLM reports to the client."""
    if not request.body.has(key):
        return None
    try:
        return request.body.value(key)
    except MALFORMED:
        return None


def _number(request: Request, key: str, default: float) -> float:
    value = _given(request, key)
    return value if isinstance(value, int | float) else default


def _about_code(text: str) -> bool:
    if any(sign in text for sign in _CODE_SIGNS):
        return True
    return _names_one(text, _LANGUAGES) and _names_one(text, _CODE_WORDS)


def _names_one(text: str, words: dict[str, re.Pattern[str]]) -> bool:
    """Whether one of the words stands in the text. Most are absent, which `in` finds faster than a pattern."""
    return any(word in text and pattern.search(text) for word, pattern in words.items())


_SCRIPTS = {
    **dict.fromkeys((0x03,), "greek"),
    **dict.fromkeys((0x04,), "cyrillic"),
    **dict.fromkeys((0x05,), "hebrew"),
    **dict.fromkeys((0x06,), "arabic"),
    **dict.fromkeys((0x09,), "devanagari"),
    **dict.fromkeys((0x0E,), "thai"),
    **dict.fromkeys((0x11, *range(0xAC, 0xD8)), "korean"),
    **dict.fromkeys((0x30, *range(0x34, 0xA0)), "cjk"),
}
"""The upper byte of a character's code -> its script; every other script counts as Latin."""


def _script(text: str) -> str:
    """The script other than Latin that most of a text's characters belong to; "" for Latin."""
    if text.isascii():
        return ""
    upper = text.encode("utf-16-le", "surrogatepass")[1::2]
    counts: Counter[str] = Counter()
    for byte, count in Counter(upper).items():
        if byte in _SCRIPTS:
            counts[_SCRIPTS[byte]] += count
    found = max(counts, key=lambda script: counts[script], default="")
    return found if found and counts[found] >= MIN_SCRIPT_SHARE * len(upper) else ""


def _answered(messages: list[Message]) -> bool:
    return any(message.role == "assistant" for message in messages)


def _is_long(texts: list[bytes]) -> bool:
    size = sum(map(len, texts))
    if size <= LONG_CHARACTERS:
        return False
    if size > _MAX_BYTES_PER_CHARACTER * LONG_CHARACTERS:
        return True
    return sum(len(text.decode("utf-8", "ignore")) - 5 * text.count(b"\\u") for text in texts) > LONG_CHARACTERS


def _is_brief(request: Request) -> bool:
    limit = _given(request, "max_completion_tokens") if request.chat else None
    if limit is None:
        limit = _given(request, "max_tokens")
    return isinstance(limit, int) and limit <= BRIEF_TOKENS
