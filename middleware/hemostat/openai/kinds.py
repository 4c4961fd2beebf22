"""The kind of traffic that a request belongs to: a name that is made from the request alone, before it is answered.

A profile serves a kind only on evidence in that kind, so a kind should hold requests that the compressed model answers
alike. The name's parts, in this order and joined by spaces; those after the third only where they apply:

    chat | completions | responses | messages
    model NAME      where the server has several models that can be scored
    label NAME      X-Hemostat-Label
    text | json | tools | grammar
                    json: the prompt asks for it in words; tools: tools are offered; grammar: a grammar is enforced
    greedy | sampled | cut
                    cut: top_p, top_k or min_p leave out tokens
    code | a script the last message of the user is about code, or is written in another script than Latin
    reply           the model has answered before in this conversation
    long            the prompt has more than LONG_CHARACTERS characters
    brief           at most BRIEF_TOKENS tokens may be generated

Of a text, only the first and last EDGE_BYTES bytes are looked at, in passes that take linear time: a name costs some
ten microseconds for usual requests, and much less than reading the body for large ones. The words decide which requests
are compared with each other, and nothing else: a text that they classify wrongly is judged among others than it could
be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

from hemostat.metrics.reasons import Unscored
from hemostat.openai.json_splice import MALFORMED
from hemostat.openai.requests import Request
from hemostat.openai.routes import Form

LONG_CHARACTERS: Final = 4_000
LONG_TOKENS: Final = 1_000
"""The same for a prompt of token ids."""
BRIEF_TOKENS: Final = 32
EDGE_BYTES: Final = 750
MAX_NAME_CHARACTERS: Final = 64
"""The number of characters of a model's name that are kept."""
SCRIPT_CHARACTERS: Final = 200
"""The number of characters of a text, evenly spaced, by which its script is determined."""
MIN_SCRIPT_SHARE: Final = 0.25
"""The least share of a text's characters for the text to count as written in a script."""

GRAMMAR_PART: Final = "grammar"
_MAX_BYTES_PER_CHARACTER: Final = 12
"""A JSON string's longest character: an escaped pair of surrogates."""
_NAMED: Final = frozenset({"model", "label"})
"""The parts that a name follows."""
_NO_TOOLS: Final = ("none", {"type": "none"})
"""The latter in `/v1/messages`."""
# Texts are searched by `find`: with `in`, CPython 3.11 first tries to read the sign as a number, and makes and drops an
# exception.
_CODE_SIGNS: Final = (
    b"```",
    b"def ",
    b"#include",
    b"public static",
    b"std::",
    b"console.log",
    b"import numpy",
    b"</div>",
)
"""The signs of code, of which any is enough."""
_LANGUAGES: Final = frozenset(
    b"python javascript typescript java c++ c# rust golang kotlin php ruby sql bash html css regex haskell perl".split()
)
_CODE_WORDS: Final = frozenset(b"code function script program class implement method query compile debug".split())
"""The words of which one has to stand in the text in addition to the name of a programming language."""
_OUTSIDE_WORDS: Final = bytes(range(256)).translate(None, b"abcdefghijklmnopqrstuvwxyz0123456789+#")
_BLANKED: Final = bytes.maketrans(_OUTSIDE_WORDS, b" " * len(_OUTSIDE_WORDS))


def kind_name(request: Request, label: str, *, several_models: bool) -> str:
    """Returns the full name of the request's kind; never raises.

    label: of X-Hemostat-Label, "" without it. several_models: the server has more than one that can be scored.
    """
    parts: list[str] = [request.form]
    if several_models and request.model:
        parts.append("model " + "_".join(request.model.split())[:MAX_NAME_CHARACTERS])
    if label:
        parts.append(f"label {label}")
    messages = request.messages
    if messages:
        last = next((m for m in reversed(messages) if m.role == "user"), messages[-1])
        asked = _edges(memoryview(last.content))
        # JSON is mostly asked for where the conversation begins, and once.
        first = [_edges(memoryview(m.content)) for m in messages[:2] if m is not last]
        prompt: Iterable[memoryview] = (memoryview(m.content) for m in messages)
    else:
        raw = b"" if request.form is not Form.COMPLETIONS else request.body.raw("prompt")
        text = memoryview(raw if raw.startswith(b'"') else b"")
        asked, first, prompt = _edges(text), [], (text,)
    words = set(asked.translate(_BLANKED).split())
    parts += [_output(request, words, first), _decoding(request)]
    subject = "code" if _about_code(asked, words) else _script(asked)
    if subject:
        parts.append(subject)
    if any(message.role == "assistant" for message in messages or ()):
        parts.append("reply")
    if request.min_prompt_tokens > LONG_TOKENS or _is_long(prompt):
        parts.append("long")
    if _is_brief(request):
        parts.append("brief")
    return " ".join(parts)


def asks_json_in_words(name: str) -> bool:
    """Returns True if requests of the kind ask for JSON in their prompts.

    >>> asks_json_in_words("chat label text json greedy"), asks_json_in_words("chat label json text greedy")
    (True, False)
    """
    return "json" in name and _output_part(name) == "json"


def is_conditional(name: str) -> bool:
    """Returns True if a grammar restricts the tokens of the kind, so that its figures are conditional on what is
    allowed.

    >>> is_conditional("chat grammar greedy"), is_conditional("chat label grammar text greedy")
    (True, False)
    """
    return GRAMMAR_PART in name and _output_part(name) == GRAMMAR_PART


def _output_part(name: str) -> str:
    parts = iter(name.split(" ")[1:])
    for part in parts:
        if part not in _NAMED:
            return part
        next(parts, "")  # the name of the model or label
    return ""


def _edges(raw: memoryview) -> bytes:
    """Returns the beginning and the end of a JSON value's bytes, in lower case, with blanks for escaped ones."""
    whole = len(raw) <= 2 * EDGE_BYTES
    text = (bytes(raw) if whole else b" ".join((raw[:EDGE_BYTES], raw[-EDGE_BYTES:]))).lower()
    return text.replace(b"\\n", b" ").replace(b"\\t", b" ") if text.find(b"\\") >= 0 else text


def _output(request: Request, words: set[bytes], first: list[bytes]) -> str:
    if request.grammar or request.unscorable is Unscored.GRAMMAR:
        return GRAMMAR_PART
    if request.tools and request.body.raw("tools") != b"[]" and _given(request, "tool_choice") not in _NO_TOOLS:
        return "tools"
    if b"json" in words:
        return "json"
    in_first = any(text.find(b"json") >= 0 and b"json" in text.translate(_BLANKED).split() for text in first)
    return "json" if in_first else "text"


def _decoding(request: Request) -> str:
    """Returns the decoding by what the client gives: what it leaves out is the server's default, equal for all of its
    requests.
    """
    if _given(request, "temperature") == 0:
        return "greedy"
    cut = _number(request, "top_p", 1.0) < 1.0 or _number(request, "top_k", 0) > 0 or _number(request, "min_p", 0) > 0
    return "cut" if cut else "sampled"


def _given(request: Request, key: str) -> Any:
    """Returns the member's value; None if it is absent or malformed, which vLLM reports to the client."""
    if not request.body.has(key):
        return None
    try:
        return request.body.value(key)
    except MALFORMED:
        return None


def _number(request: Request, key: str, default: float) -> int | float:
    """Returns the member's number, or the default. An integer may be too large for a float."""
    value = _given(request, key)
    return default if value is None or not isinstance(value, int | float) else value


def _about_code(text: bytes, words: set[bytes]) -> bool:
    named = not words.isdisjoint(_LANGUAGES) and not words.isdisjoint(_CODE_WORDS)
    return named or any(text.find(sign) >= 0 for sign in _CODE_SIGNS)


_SCRIPTS: Final = {
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


def _script(text: bytes) -> str:
    """Returns the script other than Latin that a part of the characters belongs to, the most frequent one; "" for
    Latin."""
    if text.isascii() and text.find(b"\\u") < 0:
        return ""
    # A client escapes either all characters that are not ASCII, or none.
    characters = text.decode("raw_unicode_escape" if text.isascii() else "utf-8", "ignore")
    characters = characters[:: len(characters) // SCRIPT_CHARACTERS + 1]
    upper = characters.encode("utf-16-le", "surrogatepass")[1::2]
    counts: Counter[str] = Counter()
    for byte, count in Counter(upper).items():
        if byte in _SCRIPTS:
            counts[_SCRIPTS[byte]] += count
    result = max(counts, key=lambda script: counts[script], default="")
    return result if result and counts[result] >= MIN_SCRIPT_SHARE * len(upper) else ""


def _is_long(texts: Iterable[memoryview]) -> bool:
    """Returns True if the texts, each JSON, have more than LONG_CHARACTERS characters together."""
    seen: list[memoryview] = []
    size = 0
    for text in texts:
        seen.append(text)
        size += len(text)
        if size > _MAX_BYTES_PER_CHARACTER * LONG_CHARACTERS:
            return True
    if size <= LONG_CHARACTERS:
        return False
    whole = b"".join(seen)
    return len(whole.decode("utf-8", "ignore")) - 5 * whole.count(b"\\u") > LONG_CHARACTERS


def _is_brief(request: Request) -> bool:
    limit = None
    if request.form is Form.CHAT:
        limit = _given(request, "max_completion_tokens")
    elif request.form is Form.RESPONSES:
        limit = _given(request, "max_output_tokens")
    if limit is None:
        limit = _given(request, "max_tokens")
    return isinstance(limit, int) and limit <= BRIEF_TOKENS
