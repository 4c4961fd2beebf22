"""A search for bodies that take long to read: random ones near the limits, the costliest changed further."""

from __future__ import annotations

import math
import random

from tests.support.costly_bodies import LIMIT, PARAMETERS, cpu_seconds

from hemostat.openai.routes import Form

_NAMES = (
    *PARAMETERS,
    *("role", "content", "type", "function", "name", "strict", "parameters", "input_schema", "output", "schema"),
    *("json_schema", "format", "json", "json_object", "instructions", "tool_calls", "$ref", "$defs", "properties"),
    *("disable_parallel_tool_use", "include_usage", "a", "é", '\\\\"', "\\\\u00e9", "k" * 200),
)
_WORDS = (
    *("user", "assistant", "system", "text", "function", "custom", "namespace", "image", "tool", "any", "required"),
    *("auto", "json_schema", "json_object", "token_id:5", "tool_addition", "strict", "json", "m", "enabled"),
)
_UNITS = (b"a", b'\\"', b"\\n", b"\\u00e9", "é".encode(), b" ", b"```", b"json ", b"{", b"\\\\", b"def ", "中".encode())
_ATOMS = (
    b"1",
    b"true",
    b"null",
    b"false",
    b"1e308",
    b"0.1e-300",
    b'""',
    b"{}",
    b"[]",
    b"[1]",
    b'{"type":"text"}',
    b"-0",
)
_SIZES = (1, 2, 3, 10, 100, 500, 1900, 2000, 5000, 9000, 19_000, 50_000, 99_000)
MAX_DEPTH = 5
CHANGED, DROPPED, RESTARTED = 0.5, 0.15, 0.003
"""How often the costliest body so far is changed further, loses a member, and is given up for a new beginning."""


def _value(draw: random.Random, depth: int) -> bytes:
    kind = draw.random()
    if depth >= MAX_DEPTH or kind < 0.2:
        return draw.choice(_ATOMS)
    if kind < 0.35:
        return b'"%b"' % draw.choice(_WORDS).encode()
    if kind < 0.45:
        unit = draw.choice(_UNITS)
        return b'"%b"' % (unit * draw.choice((1, 10, 300, 1000, 30_000, 200_000)))
    if kind < 0.7:
        names = draw.sample(_NAMES, draw.choice((1, 2, 3, 5)))
        return b"{" + b",".join(b'"%b":%b' % (name.encode(), _value(draw, depth + 1)) for name in names) + b"}"
    if kind < 0.78:
        value, number = _value(draw, depth + 2), draw.choice(_SIZES)
        return b"{" + b",".join(b'"%x":%b' % (index, value) for index in range(_fitting(number, value))) + b"}"
    value, number = _value(draw, depth + 1), draw.choice(_SIZES)
    return b"[" + b",".join([value] * _fitting(number, value)) + b"]"


def _fitting(number: int, value: bytes) -> int:
    return max(1, min(number, (LIMIT - 2000) // (len(value) + 1)))


def worst(number: int, seed: int, limit: float = math.inf) -> float:
    """The most CPU seconds that one of so many bodies takes, as a request of the form for which it takes most.

    limit: of `cpu_seconds`.
    """
    draw = random.Random(seed)
    highest, best, costliest = 0.0, 0.0, {}
    for _ in range(number):
        members = dict(costliest) if draw.random() < CHANGED else {"model": b'"m"'}
        if costliest and draw.random() < DROPPED:
            members.pop(draw.choice(list(members)), None)
        for _ in range(draw.choice((1, 1, 2, 3))):
            members[draw.choice(PARAMETERS)] = _value(draw, 0)
        data = b"{" + b",".join(b'"%b":%b' % (name.encode(), value) for name, value in members.items()) + b"}"
        if len(data) > LIMIT:
            continue
        cost = max(cpu_seconds(data, form, limit) for form in Form)
        highest = max(highest, cost)
        if cost > best:
            best, costliest = cost, members
        elif draw.random() < RESTARTED:
            best, costliest = 0.0, {}
    return highest
