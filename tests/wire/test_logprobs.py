"""The quick ways through vLLM's own serialization give what parsing everything gives, and nothing injected gets out."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hemostat.metrics.reasons import Unscored
from hemostat.openai import stripping
from hemostat.openai import tokens as openai_tokens
from hemostat.openai.forms.table import FORMATS
from hemostat.openai.json_splice import MALFORMED, encode
from hemostat.openai.logprobs.cutting import cut_logprobs
from hemostat.openai.logprobs.rows import Rows, parse_rows, read_rows, usual_rows
from hemostat.openai.logprobs.scrubbing import Scrubber, scrub
from hemostat.openai.reading import read_request
from hemostat.openai.routes import Form
from hemostat.openai.tokens import ResponseTokens

TOP_K = 4
VALUES = st.one_of(
    st.floats(-120.0, 0.0, width=32),
    st.floats(-(2.0**-10), 0.0, width=32),
    st.sampled_from([0.0, -0.0, -1e-45, -9999.0, -1.1920928244535389e-07, -99.99999237060547, -10.0, -0.5]),
)


def named(token: int, value: float) -> dict[str, Any]:
    name = f"token_id:{token}"
    return {"token": name, "logprob": value, "bytes": list(name.encode())}


@st.composite
def entries(draw: st.DrawFn, positions: int) -> list[dict[str, Any]]:
    """Of `logprobs.content`, as vLLM writes them: the emitted token first, then the others by their rank."""
    made = []
    for _ in range(positions):
        ids = draw(st.lists(st.integers(0, 9_999_999), min_size=TOP_K, max_size=TOP_K, unique=True))
        values = draw(st.lists(VALUES, min_size=TOP_K, max_size=TOP_K))
        values[1:] = sorted(values[1:], reverse=True)
        tops = [named(token, float(value)) for token, value in zip(ids, values, strict=True)]
        made.append(tops[0] | {"bytes": [84], "top_logprobs": tops})
    return made


def outcome(read: Callable[[], Sequence[Any] | None]) -> list[bytes] | None:
    """The arrays' bytes; None: malformed."""
    try:
        result = read()
    except MALFORMED:
        return None
    return None if result is None else [array.tobytes() for array in result]


@given(st.data())
def test_numbers_are_those_that_a_parser_reads(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 3).flatmap(entries))
    output = [int(row["token"][9:]) for row in rows]
    # A stream has them in pieces.
    pieces = [encode({"content": [row]}) for row in rows] if data.draw(st.booleans()) else [encode({"content": rows})]
    result = usual_rows(pieces, output, TOP_K)
    assert result is not None
    assert outcome(lambda: result) == outcome(lambda: parse_rows(Form.CHAT, pieces, output, TOP_K))
    assert usual_rows(pieces, [output[0] + 1, *output[1:]], TOP_K) is None
    assert usual_rows(pieces, output, TOP_K - 1) is None


def reordered(text: str, rows: list[dict[str, Any]]) -> str:
    return json.dumps({"content": [dict(reversed(row.items())) for row in rows]}, separators=(",", ":"))


MUTATIONS: dict[str, Callable[[str, list[dict[str, Any]]], str]] = {
    "as it is": lambda text, rows: text,
    "white space": lambda text, rows: json.dumps({"content": rows}),
    "indented": lambda text, rows: json.dumps({"content": rows}, indent=1),
    "other order of members": reordered,
    "a member more": lambda text, rows: text.replace(',"bytes"', ',"rank":3,"bytes"'),
    "a member twice": lambda text, rows: text.replace(',"bytes"', ',"logprob":-3.5,"bytes"', 2),
    "an entry less": lambda text, rows: json.dumps({"content": rows[1:]}, separators=(",", ":")),
    "an alternative less": lambda text, rows: json.dumps(
        {"content": [row | {"top_logprobs": row["top_logprobs"][:-1]} for row in rows]}, separators=(",", ":")
    ),
    "an alternative twice": lambda text, rows: json.dumps(
        {"content": [row | {"top_logprobs": [*row["top_logprobs"][:-1], row["top_logprobs"][1]]} for row in rows]},
        separators=(",", ":"),
    ),
    "not the emitted one first": lambda text, rows: json.dumps(
        {"content": [row | {"top_logprobs": row["top_logprobs"][::-1]} for row in rows]}, separators=(",", ":")
    ),
    "as texts": lambda text, rows: text.replace("token_id:", "d:"),
    "null": lambda text, rows: "null",
    "no number": lambda text, rows: text.replace('"logprob":-', '"logprob":--', 1),
    "NaN": lambda text, rows: text.replace('"logprob":', '"logprob":NaN,"x":', 1),
    "a number in another style": lambda text, rows: text.replace(',"bytes"', 'e0,"bytes"', 1),
    "a leading zero": lambda text, rows: text.replace('"logprob":-', '"logprob":-0', 1),
    "a large id": lambda text, rows: text.replace("token_id:", "token_id:123456789", 1),
    "an empty id": lambda text, rows: text.replace('"token_id:1', '"token_id:"1', 1),
    "ends early": lambda text, rows: text[:-4],
}


@pytest.mark.parametrize("how", MUTATIONS)
@settings(max_examples=20)
@given(data=st.data())
def test_another_style_is_parsed(how: str, data: st.DataObject) -> None:
    rows = data.draw(entries(2))
    output = [int(row["token"][9:]) for row in rows]
    piece = MUTATIONS[how](json.dumps({"content": rows}, separators=(",", ":")), rows).encode()
    assert_read_as_parsed(piece, output)


def assert_read_as_parsed(piece: bytes, output: list[int]) -> None:
    whole = outcome(lambda: parse_rows(Form.CHAT, [piece], output, TOP_K))
    assert outcome(lambda: read_rows(Form.CHAT, [piece], output, TOP_K)) == whole


NAMES = [
    *(
        "",
        "5",
        "token_id:",
        "token_id:5,",
        "token_id:5,token_id:6",
        ",token_id:5",
        "token_id:5token_id:6",
        "token_id:05",
    ),
    *("token_id:5 ", "token_id: 5", "token_id:-5", "token_id:+5", "token_id:1_0", "token_id:\u0663", "token_id:5\n"),
    *("Token_id:5", "token_id:999999999", "token_id:2147483648", "token_id:5.0", 'token_id:5","logprob":-1.5,"'),
]


@given(entries(2), st.dictionaries(st.integers(0, 2 * TOP_K - 1), st.sampled_from(NAMES), max_size=4))
@example([], {})
def test_no_name_is_taken_for_another(rows: list[dict[str, Any]], names: dict[int, str]) -> None:
    output = [int(row["token"][9:]) for row in rows]
    tops = [top for row in rows for top in row["top_logprobs"]]
    for at, name in names.items():
        if tops:
            tops[at]["token"] = name
    assert_read_as_parsed(encode({"content": rows}), output)


@given(entries(2), st.permutations(range(2 * TOP_K)), st.integers(0, 2 * TOP_K))
def test_any_alternatives_are_read(rows: list[dict[str, Any]], order: list[int], first: int) -> None:
    """Moved within and between the positions, which then may have more or fewer."""
    tops = [top for row in rows for top in row["top_logprobs"]]
    moved = [tops[at] for at in order]
    both = [row | {"top_logprobs": part} for row, part in zip(rows, (moved[:first], moved[first:]), strict=True)]
    assert_read_as_parsed(encode({"content": both}), [int(row["token"][9:]) for row in rows])


# --- cutting ---------------------------------------------------------------------------------------------------------

TEXTS = st.text(max_size=5) | st.sampled_from(['"},"logprobs":{"', "\\", '\\"', "},", "x\n", ',"finish_reason":'])


def chat_event(text: str, rows: list[dict[str, Any]], finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "delta": {"content": text} | more.pop("delta", {}),
                "logprobs": {"content": rows} if rows else None,
                "finish_reason": finish,
                **({} if finish is None else {"stop_reason": None}),
                "token_ids": [int(row["token"][9:]) for row in rows] or None,
            }
            | more
        ],
    }


def as_event(body: Any, *, spaced: bool = False) -> bytes:
    return b"data: " + (json.dumps(body).encode() if spaced else encode(body)) + b"\n\n"


EVENTS: dict[str, Callable[[str, list[dict[str, Any]]], bytes]] = {
    "usual": lambda text, rows: as_event(chat_event(text, rows)),
    "spaced": lambda text, rows: as_event(chat_event(text, rows), spaced=True),
    "a member more": lambda text, rows: as_event(chat_event(text, rows, extra={"a": [1]})),
    "a member in the delta": lambda text, rows: as_event(chat_event(text, rows, delta={"tool_calls": [{"index": 0}]})),
    "reasoning": lambda text, rows: as_event(chat_event(text, rows)).replace(b'"content":"', b'"reasoning":"', 1),
    "held back": lambda text, rows: as_event(chat_event(text, rows) | {}).replace(
        b'"delta":{"content":%b}' % encode(text), b'"delta":{}'
    ),
    "usage": lambda text, rows: as_event(
        chat_event(text, rows) | {"usage": {"prompt_tokens": 1, "completion_tokens": 1}}
    ),
    "two events": lambda text, rows: 2 * as_event(chat_event(text, rows)),
    "with carriage returns": lambda text, rows: as_event(chat_event(text, rows)).replace(b"\n", b"\r\n"),
    "a comment": lambda text, rows: b": ping\n\n",
    "an error": lambda text, rows: as_event({"error": {"message": "x", "code": 500}}),
    "two choices": lambda text, rows: as_event(
        chat_event(text, rows) | {"choices": 2 * chat_event(text, rows)["choices"]}
    ),
    "another choice": lambda text, rows: as_event(chat_event(text, rows)).replace(b'"index":0', b'"index":1', 1),
}
REQUEST = read_request(b'{"messages":[{"role":"user","content":"x"}],"stream":true}', form=Form.CHAT)


def stripped(stream: bool, pieces: Sequence[bytes]) -> tuple[bytes, list[Any]]:
    """What the client gets, and what was recorded."""
    tokens = ResponseTokens(TOP_K, 100)
    stripper = FORMATS[Form.CHAT].stripper(REQUEST, tokens, stream=stream)
    out = b"".join([stripper.feed(piece) for piece in pieces]) + stripper.finish()
    recorded: list[Any] = [tokens.failure, tokens.model]
    for choice in tokens.choices:
        rows = outcome(lambda: parse_rows(Form.CHAT, choice.logprobs, choice.output_ids, TOP_K))  # noqa: B023
        recorded += [choice.output_ids.tolist(), rows, choice.finish_reason, choice.reasoning]
    return out, recorded


@given(st.lists(st.tuples(st.sampled_from([*EVENTS, *["usual"] * 6]), TEXTS, entries(1)), max_size=6), entries(1))
def test_a_stream_in_whole_events_gives_what_one_in_pieces_does(
    drawn: list[tuple[str, str, list[dict[str, Any]]]], last: list[dict[str, Any]]
) -> None:
    events = [as_event(chat_event("", [])), *(EVENTS[kind](text, rows) for kind, text, rows in drawn)]
    events += [as_event(chat_event("x", last, "stop")), b"data: [DONE]\n\n"]
    # In halves, no event is cut by its bytes.
    halves = [event[at : at + len(event) // 2 + 1] for event in events for at in (0, len(event) // 2 + 1)]
    assert stripped(True, events) == stripped(True, halves)


def test_a_usual_event_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [named(5, -0.5) | {"top_logprobs": [named(5, -0.5), named(6, -1.5)]}]
    tokens = ResponseTokens(1, 100)
    stripper = FORMATS[Form.CHAT].stripper(REQUEST, tokens, stream=True)
    stripper.feed(as_event(chat_event("", [])))
    monkeypatch.setattr(stripping, "_Parsed", None)
    out = stripper.feed(as_event(chat_event("x", rows)))
    assert json.loads(out[6:])["choices"][0] == chat_event("x", [])["choices"][0]
    assert tokens.choices[0].output_ids.tolist() == [5]


@given(TEXTS, entries(2), st.booleans(), st.sampled_from([{}, {"refusal": None}, {"after": {"a": [{}]}}]))
@example('"},"logprobs":{"', [], False, {})
def test_a_body_with_its_logprobs_cut_out_gives_what_parsing_all_does(
    text: str, rows: list[dict[str, Any]], spaced: bool, more: dict[str, Any]
) -> None:
    whole = chat_event(text, rows, "stop", **more) | {"usage": {"prompt_tokens": 0, "completion_tokens": 2}}
    if "refusal" in more and rows:
        whole["choices"][0]["logprobs"] |= more
    body = json.dumps(whole).encode() if spaced else encode(whole)
    quick = stripped(False, [body])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stripping, "cut_logprobs", lambda data: None)
        assert quick == stripped(False, [body])
    assert (cut_logprobs(body) is None) == (spaced or not rows)


def test_a_long_output_is_parsed_in_the_relay_and_held_as_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_tokens, "MAX_UNPARSED_BYTES", 4000)
    rows = [named(5, -0.5) | {"top_logprobs": [named(5 + n, -0.5 - n) for n in range(TOP_K)]}]
    events = [as_event(chat_event("", [])), *60 * [as_event(chat_event("x", rows))]]
    tokens = ResponseTokens(TOP_K, 5000)
    stripper = FORMATS[Form.CHAT].stripper(REQUEST, tokens, stream=True)
    for event in [*events, as_event(chat_event("x", rows, "stop"))]:
        stripper.feed(event)
        assert tokens.choices[0].unparsed_bytes <= 4000
    stripper.feed(as_event({"choices": [], "usage": {"prompt_tokens": 0, "completion_tokens": 61}}))
    stripper.finish()
    [choice] = tokens.choices
    assert tokens.failure is None
    assert not choice.logprobs
    result = [np.concatenate(arrays) for arrays in zip(*choice.parsed, strict=True)]
    expected: Rows = parse_rows(Form.CHAT, 61 * [encode({"content": rows})], 61 * [5], TOP_K)
    assert all((a == b).all() for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("ids", [b"5000000000", b"5,%b" % (b"9" * 40), b"9" * 5000], ids=["array", "list", "int"])
def test_ids_out_of_range_do_not_let_logprobs_through(ids: bytes) -> None:
    """In events of the usual form, whose tokens are cut out without parsing them."""
    rows = [named(5, -0.5) | {"top_logprobs": [named(5, -0.5)]}]
    usual = as_event(chat_event("x", rows))
    tokens = ResponseTokens(TOP_K, 100)
    stripper = FORMATS[Form.CHAT].stripper(REQUEST, tokens, stream=True)
    expected = [stripper.feed(usual), stripper.feed(usual)][1]
    assert tokens.failure is None
    out = stripper.feed(usual.replace(b'"token_ids":[5]', b'"token_ids":[%b]' % ids))
    assert out.count(b"data: ") == 1
    assert b"token_id:" not in out
    assert stripper.feed(usual) == expected
    assert tokens.failure in {Unscored.NO_LOGPROBS, Unscored.UNREADABLE}


# --- what cannot be parsed -------------------------------------------------------------------------------------------

ROWS = [named(5, -0.5) | {"top_logprobs": [named(5, -0.5), named(6, -1.5)]}]
BODY = encode(chat_event("t", ROWS, "stop") | {"prompt_token_ids": [1, 2]})
DAMAGED: dict[str, bytes] = {
    "ends early": BODY[:-30],
    "ends in the logprobs": BODY[: BODY.index(b"token_id:6")],
    "ends in a string": BODY[: BODY.index(b'oken_id:6"') + 3],
    "a key twice": BODY.replace(b'"model":"m"', b'"model":"m","model":"n"'),
    "choices twice": BODY[:-1] + b"," + BODY[BODY.index(b'"choices"') :],
    "NaN": BODY.replace(b'"created":1', b'"created":NaN'),
    "NaN as a log-probability": BODY.replace(b'"logprob":-0.5', b'"logprob":NaN'),
    "a byte order mark": b"\xef\xbb\xbf" + BODY,
    "two objects": BODY + BODY,
    "an escaped end of the text": BODY.replace(b'"t"', b'"\\\\"').replace(b'"created":1', b'"created":01'),
}


def is_clean(answer: bytes) -> bool:
    return b"token_id:" not in answer and b"[1,2]" not in answer and b"[5]" not in answer and b'logprob"' not in answer


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", DAMAGED)
def test_nothing_injected_gets_out_of_what_cannot_be_parsed(how: str, stream: bool) -> None:
    data = DAMAGED[how]
    data = b"data: " + data + b"\n\ndata: after\n\n" if stream else data
    for pieces in ([data], [data[:100], data[100:]], [bytes([byte]) for byte in data]):
        out, (failure, *_) = stripped(stream, pieces)
        assert is_clean(out), out
        assert failure is not None or how == "NaN as a log-probability"
        assert out.endswith(b"data: after\n\n") == stream
        assert (b'"content":"t"' in out) == (how != "an escaped end of the text")


@pytest.mark.parametrize("stream", [False, True])
def test_nothing_injected_gets_out_of_what_is_too_large(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    monkeypatch.setattr(stripping, "MAX_BODY", 64)
    monkeypatch.setattr(stripping.sse.Parser.__init__, "__defaults__", (64,))
    data = b"data: " + BODY + b"\n\n" if stream else BODY
    for size in (1, 7, 100, 10_000):
        pieces = [data[at : at + size] for at in range(0, len(data), size)]
        out, _ = stripped(stream, pieces)
        assert is_clean(out), out
        assert json.loads(out[6:] if stream else out)["choices"][0]["delta"] == {"content": "t"}


@given(st.data(), st.booleans())
def test_a_scrubber_gives_the_same_at_any_boundaries_and_changes_nothing_else(
    data: st.DataObject, stream: bool
) -> None:
    text = data.draw(TEXTS)
    value = {
        "text": text,
        "logprobs": {"tokens": [text, "]}"], "x": None},
        "token_ids": [1],
        "z": {"prompt_token_ids": [2]},
    }
    body = json.dumps(value, ensure_ascii=data.draw(st.booleans())).encode()
    expected = json.dumps(
        value | {"logprobs": None, "token_ids": None, "z": {"prompt_token_ids": None}}, ensure_ascii=body.isascii()
    )
    places = sorted({0, len(body), *data.draw(st.lists(st.integers(0, len(body)), max_size=8))})
    scrubber = Scrubber(stream=stream)
    out = b"".join([scrubber.feed(body[a:b]) for a, b in itertools.pairwise(places)]) + scrubber.finish()
    assert out == scrub(body, stream=stream)
    assert json.loads(out) == json.loads(expected)
