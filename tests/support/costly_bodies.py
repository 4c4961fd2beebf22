"""Bodies that take long to read, for as many bytes as they have: as large as what is read, and beyond."""

from __future__ import annotations

import math
import time

from tests.support.wire import VERSION, policy

from hemostat.interception.intercepted_exchange import InterceptedExchange
from hemostat.interception.interceptor import Interceptor
from hemostat.openai.complexity import MAX_CONTAINERS, MAX_ESCAPES, MAX_MESSAGES, MAX_STRINGS
from hemostat.openai.conversation_key import conversation_key
from hemostat.openai.json_splice import MAX_KEY_CHARACTERS, MAX_MEMBERS, MAX_VALUE_BYTES
from hemostat.openai.routes import FORMS, Form
from hemostat.relay.outcomes import OutcomeObserver

LIMIT = policy().body_limit
PARAMETERS = (
    *("model", "n", "stream", "echo", "logprobs", "top_logprobs", "use_beam_search", "logit_bias", "bad_words"),
    *("allowed_token_ids", "min_tokens", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature"),
    *("top_p", "top_k", "min_p", "vllm_xargs", "thinking", "tool_choice", "parallel_tool_calls", "watermarking"),
    *("include_reasoning", "return_token_ids", "return_tokens_as_token_ids", "max_tokens", "max_completion_tokens"),
    *("max_output_tokens", "background", "logprob_token_ids", "stream_options", "response_format"),
    *("structured_outputs", "text", "output_config", "tools", "prompt", "input", "messages", "system"),
)


def body(**members: bytes) -> bytes:
    members = {
        "model": b'"m"',
        "messages": b'[{"role":"user","content":"x"}]',
        "prompt": b'"x"',
        "input": b'"x"',
    } | members
    return b"{" + b",".join(b'"%b":%b' % (name.encode(), value) for name, value in members.items()) + b"}"


def listed(element: bytes, number: int) -> bytes:
    return b"[" + b",".join([element] * number) + b"]"


def members(number: int, value: bytes = b"0") -> bytes:
    return b",".join(b'"%x":%b' % (index, value) for index in range(number))


def filling(element: bytes) -> int:
    """How many of these elements fit into a body that is read."""
    return (LIMIT - 200) // (len(element) + 1)


SLOW = listed(b"1e308", (MAX_VALUE_BYTES - 10) // 6)
TEXTS = (b"a", b'\\"', b"\\n", b"\\u00e9", "é".encode(), b" ")
WITHIN = {
    # As large as what is still read.
    "messages": body(messages=listed(b'{"role":"assistant","content":[{"type":"text"}]}', MAX_MESSAGES)),
    "results": body(messages=listed(b'{"role":"assistant","content":[{"content":[{}]}]}', MAX_MESSAGES)),
    "long messages": body(messages=listed(b'{"role":"assistant","content":"%b"}' % (b"x" * 200), MAX_MESSAGES)),
    "parts": body(messages=listed(b'{"role":"user","content":%b}' % listed(b'{"type":"text"}', MAX_MESSAGES), 1)),
    "blocks": body(messages=listed(b'{"content":%b}' % listed(b'{"content":[{}]}', MAX_MESSAGES), 1)),
    "items": body(input=listed(b'{"content":[{"type":"text"}],"output":""}', MAX_MESSAGES)),
    "tools": body(tools=listed(b'{"type":"function","function":{"name":"a"}}', 2500)),
    "strict tools": body(tools=listed(b'{"function":{"strict":1}}', 750)),
    "flat tools": body(tools=listed(b'{"name":"a","strict":1}', 1_500)),
    "tools with schemas": body(tools=listed(b'{"strict":1,"input_schema":{"$ref":1}}', 750)),
    "schemas with members": body(tools=listed(b'{"strict":1,"input_schema":{%b}}' % members(240), 32)),
    "namespaces": body(
        tools=listed(b'{"type":"namespace","tools":%b}' % listed(b'{"name":"a","strict":1}', 99), 19),
        tool_choice=b'{"type":"function","name":"b"}',
    ),
    "texts": body(prompt=listed(b'"%b"' % ("中" * 80).encode(), MAX_MESSAGES)),
    "words": body(messages=b'[{"role":"user","content":"%b"}]' % (b"json " * filling(b"json"))),
    "strings": body(stop=listed(b'""', MAX_STRINGS - 50)),
    "ids": body(prompt=listed(b"1", 99_000)),
    "lists of ids": body(prompt=listed(listed(b"1", 49), MAX_MESSAGES)),
    "members": b"{"
    + b",".join(
        b'"%b%03d":"%b"' % (b"k" * (MAX_KEY_CHARACTERS - 3), index, b'\\"' * (MAX_ESCAPES // MAX_MEMBERS))
        for index in range(MAX_MEMBERS)
    )
    + b"}",
    "members of a format": body(response_format=b"{%b}" % members(7000), text=b"{%b}" % members(7000)),
    "members of options": body(stream_options=b"{%b}" % members(MAX_STRINGS - 50, b"{}")),
    "members of arguments": body(vllm_xargs=b"{%b}" % members(100)),
    "white space": b"{" + b" " * (LIMIT - 100) + b'"a":1 }',
    "slow numbers": body(**dict.fromkeys(PARAMETERS, b"[1e308,1e308,1e308,1e308]")),
    "long numbers": body(**dict.fromkeys(PARAMETERS, b"1" * 800 + b"e-900")),
    "deep lists": body(**dict.fromkeys(PARAMETERS, b"[" * 250 + b"]" * 250)),
    **{
        f"a text of {unit!r}": body(messages=b'[{"role":"user","content":"%b"}]' % (unit * filling(unit * 2)))
        for unit in TEXTS
    },
    **{f"a prompt of {unit!r}": body(prompt=b'"%b"' % (unit * filling(unit * 2))) for unit in TEXTS},
    **{f"a key of {unit!r}": body(**{unit.decode() * 99: b"1"}) for unit in TEXTS},
}
BEYOND = {
    "400,000 members": b"{%b}" % members(400_000),
    "1.3 million empty messages": body(messages=listed(b"{}", 1_300_000)),
    "one escaped key of 4 MB": body(**{'\\"' * 2_000_000: b"1"}),
    "members": b"{%b}" % members(filling(b'"00000":0')),
    "empty messages": body(messages=listed(b"{}", filling(b"{}"))),
    "empty parts": body(messages=listed(b'{"content":%b}' % listed(b"{}", filling(b"{}")), 1)),
    "an escaped key": body(**{'\\"' * 200_000: b"1"}),
    "a long key": body(**{"k" * 400_000: b"1"}),
    "empty texts": body(prompt=listed(b'""', filling(b'""'))),
    "ids": body(prompt=listed(b"1", filling(b"1"))),
    "lists of ids": body(prompt=listed(listed(b"1", 4), MAX_CONTAINERS - 50)),
    "texts": body(prompt=listed(b'""', MAX_STRINGS - 50)),
    "empty lists": body(prompt=listed(b"[1]", filling(b"[1]"))),
    "escaped backslashes": b"{%b}" % members(50_000).replace(b'":', b'\\\\":'),
    **{f"slow numbers in {name}": body(**{name: listed(b"1e308", 80_000)}) for name in PARAMETERS},
    **{f"a list in {name}": body(**{name: listed(b"{}", 150_000)}) for name in PARAMETERS},
    **{f"slow numbers in short {name}": body(**{name: SLOW}) for name in PARAMETERS},
    "slow numbers everywhere": body(**dict.fromkeys(PARAMETERS, SLOW)),
}


POLICY = policy(
    served=VERSION,
    tap=True,
    tap_tokens=True,
    grammars=True,
    control_fraction=0.0,
    scorable_models=frozenset({"m", "n"}),
    kinds=frozenset({"chat text sampled"}),
)
"""Sampled, treated and compared: the relay does with a body whatever it can do."""
ROUTES = {form: route for route, form in FORMS.items()}


def _read(data: bytes, form: Form) -> None:
    """What the relay does with a body before it goes upstream, as far as its cost depends on what is in it."""
    interceptor = Interceptor(POLICY, lambda capture: True, lambda metric, labels: None, draw=lambda: 0.0)
    observer = OutcomeObserver(form)
    observer.feed_request(data)
    conversation_key(data)
    hook = interceptor.begin("POST", ROUTES[form].encode(), [], "r1")
    assert isinstance(hook, InterceptedExchange)
    hook.request(data if len(data) <= LIMIT else None)
    if hook.comparison is not None:
        observer.compare(data, json_in_words=hook.comparison.json_in_words)


def cpu_seconds(data: bytes, form: Form, limit: float = math.inf) -> float:
    """The least of three, or of up to 30 until one is within `limit`: whatever else the machine does adds to it."""
    least = math.inf
    for number in range(30):
        if number >= 3 and least <= limit:
            break
        started = time.thread_time()
        _read(data, form)
        least = min(least, time.thread_time() - started)
    return least
