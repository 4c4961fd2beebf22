"""Checks if a JSON value fits a JSON schema that a client sent, in a bounded number of steps.

A general validator cannot be used on the relay's event loop: its time is set by the client (nested `anyOf`, `pattern`,
references that expand exponentially, messages that quote the value). This one decides the same for the keywords that
it knows (`tests/relay/test_schema_check.py` compares it with `jsonschema`, draft 2020-12), counts its steps, and gives
no answer where a schema needs more: another keyword that restricts values, a reference to anything but the schema's
own definitions, recursion, more than MAX_SCHEMA_BYTES or MAX_SCHEMA_NODES, or more than MAX_STEPS for one answer.
`format` is ignored: in JSON schema it is an annotation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_NODES = 500
"""The largest number of schemas within a schema, and values of `enum` and `const`, after references are replaced by
what they refer to."""
MAX_DEPTH = 40
"""The largest depth of a schema, and of values that are compared with `enum` and `const`."""
MAX_STEPS = 4_000
"""The largest number of comparisons for one answer."""

_SUBSCHEMAS = frozenset({"additionalProperties", "items", "not"})
_LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_LIMITS = frozenset(
    {
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
        *("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
    }
)
_REFUSED = frozenset(
    {
        *("pattern", "patternProperties", "propertyNames", "uniqueItems", "contains", "minContains", "maxContains"),
        *("if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies", "additionalItems"),
        *("unevaluatedItems", "unevaluatedProperties", "$dynamicRef", "$recursiveRef", "$id", "$anchor"),
        "$dynamicAnchor",
    }
)
"""The keywords that restrict values, or change what a reference means, and are not evaluated."""
_TYPES = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})


class TooExpensiveError(Exception):
    """The schema is not one that is evaluated, or an answer takes too many steps."""


class Steps:
    """The steps that are left for one answer."""

    __slots__ = ("left",)

    def __init__(self, left: int = MAX_STEPS) -> None:
        self.left = left

    def take(self, steps: int) -> None:
        """Raises TooExpensiveError if fewer are left."""
        self.left -= steps
        if self.left < 0:
            raise TooExpensiveError


class Schema:
    """A client's schema, made ready to be compared with answers. Never raises.

    raw: its JSON, or JSON of a string with that JSON.

    >>> schema = Schema(b'{"properties": {"age": {"type": "integer", "minimum": 0}}, "required": ["age"]}')
    >>> schema.fits({"age": 3}, Steps()), schema.fits({"age": "3"}, Steps())
    (True, False)
    >>> Schema(b'{"pattern": "^[0-9]$"}').fits("3", Steps()) is None
    True
    """

    __slots__ = ("_compiled",)

    def __init__(self, raw: bytes) -> None:
        self._compiled: bool | dict[str, Any] | None = None
        """The compiled schema; None if it is not evaluated."""
        if len(raw) > MAX_SCHEMA_BYTES:
            return
        try:
            decoded = msgspec.json.decode(raw)
            if isinstance(decoded, str):
                decoded = msgspec.json.decode(decoded)
            self._compiled = _Compiler(decoded).compile(decoded, 0, ())
        except (TooExpensiveError, msgspec.MsgspecError, UnicodeError, RecursionError):
            pass

    def fits(self, value: Any, steps: Steps) -> bool | None:
        """Returns if a decoded JSON value fits; None if that is not evaluated."""
        if self._compiled is None:
            return None
        try:
            return _fits(value, self._compiled, steps)
        except (TooExpensiveError, RecursionError, ArithmeticError):
            return None


class _Compiler:
    """Makes a schema of known keywords only, without references. Raises TooExpensiveError if it is not evaluated."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._nodes = 0

    def compile(self, schema: Any, depth: int, followed: tuple[str, ...]) -> bool | dict[str, Any]:
        """Returns the schema in the form that `_fits` takes. followed: the references on the way to here."""
        self._count(1)
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict) or depth > MAX_DEPTH or not _REFUSED.isdisjoint(schema):
            raise TooExpensiveError
        compiled: dict[str, Any] = {}
        for keyword, given in schema.items():
            if keyword == "$ref":
                # Beside other keywords it is one more schema that has to fit.
                compiled["$ref"] = self._referred(given, depth, followed)
            elif keyword in _SUBSCHEMAS:
                compiled[keyword] = self.compile(given, depth + 1, followed)
            elif keyword in _LISTS:
                if not isinstance(given, list) or not given:
                    raise TooExpensiveError
                compiled[keyword] = [self.compile(part, depth + 1, followed) for part in given]
            elif keyword == "properties":
                if not isinstance(given, dict):
                    raise TooExpensiveError
                compiled[keyword] = {name: self.compile(part, depth + 1, followed) for name, part in given.items()}
            elif keyword in {"enum", "const"}:
                values = given if keyword == "enum" else [given]
                if not isinstance(values, list):
                    raise TooExpensiveError
                self._count_values(values, 0)
                compiled["enum"] = [*compiled.get("enum", ()), values]
            elif keyword == "required":
                if not isinstance(given, list):
                    raise TooExpensiveError
                self._count(len(given))
                compiled[keyword] = given
            elif keyword == "type":
                types = given if isinstance(given, list) else [given]
                if not all(isinstance(name, str) for name in types) or not _TYPES.issuperset(types):
                    raise TooExpensiveError
                compiled[keyword] = types
            elif keyword in _LIMITS:
                if isinstance(given, bool) or not isinstance(given, int | float):
                    raise TooExpensiveError
                compiled[keyword] = given
        return compiled

    def _referred(self, reference: Any, depth: int, followed: tuple[str, ...]) -> bool | dict[str, Any]:
        if not isinstance(reference, str) or reference in followed:
            raise TooExpensiveError
        start, _, name = reference.rpartition("/")
        if start not in {"#/$defs", "#/definitions"} or "~" in name or "%" in name:
            raise TooExpensiveError
        definitions = self._root.get(start[2:])
        if not isinstance(definitions, dict) or name not in definitions:
            raise TooExpensiveError
        return self.compile(definitions[name], depth + 1, (*followed, reference))

    def _count_values(self, value: Any, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise TooExpensiveError
        if isinstance(value, dict | list):
            self._count(len(value))
            for part in value.values() if isinstance(value, dict) else value:
                self._count_values(part, depth + 1)

    def _count(self, nodes: int) -> None:
        self._nodes += nodes
        if self._nodes > MAX_SCHEMA_NODES:
            raise TooExpensiveError


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_OF_TYPE: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: _is_number(value) and (isinstance(value, int) or value.is_integer()),
    "number": _is_number,
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


def _fits(value: Any, schema: bool | dict[str, Any], steps: Steps) -> bool:
    steps.take(1)
    if isinstance(schema, bool):
        return schema
    for keyword, given in schema.items():
        steps.take(1)
        if not _CHECKS[keyword](value, given, schema, steps):
            return False
    return True


def _type(value: Any, given: Any, schema: dict[str, Any], steps: Steps) -> bool:
    return any(_OF_TYPE[name](value) for name in given)


def _enum(value: Any, given: Any, schema: dict[str, Any], steps: Steps) -> bool:
    return all(any(_equal(value, allowed, steps) for allowed in values) for values in given)


def _equal(a: Any, b: Any, steps: Steps) -> bool:
    """Compares two values as JSON does: 1 equals 1.0, and true does not equal 1."""
    steps.take(1)
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return len(a) == len(b) and all(name in b and _equal(part, b[name], steps) for name, part in a.items())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_equal(x, y, steps) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _properties(value: Any, given: Any, schema: dict[str, Any], steps: Steps) -> bool:
    if not isinstance(value, dict):
        return True
    steps.take(len(given))
    return all(_fits(value[name], part, steps) for name, part in given.items() if name in value)


def _additional_properties(value: Any, given: Any, schema: dict[str, Any], steps: Steps) -> bool:
    if not isinstance(value, dict):
        return True
    known = schema.get("properties", {})
    steps.take(len(value))
    return all(_fits(part, given, steps) for name, part in value.items() if name not in known)


def _required(value: Any, given: Any, schema: dict[str, Any], steps: Steps) -> bool:
    if not isinstance(value, dict):
        return True
    steps.take(len(given))
    return all(name in value for name in given if isinstance(name, str))


def _items(value: Any, given: Any, schema: dict[str, Any], steps: Steps) -> bool:
    if not isinstance(value, list):
        return True
    return all(_fits(part, given, steps) for part in value[len(schema.get("prefixItems", ())) :])


def _prefix_items(value: Any, given: Any, schema: dict[str, Any], steps: Steps) -> bool:
    return not isinstance(value, list) or all(
        _fits(part, first, steps) for part, first in zip(value, given, strict=False)
    )


def _all_of(value: Any, given: Any, schema: dict[str, Any], steps: Steps) -> bool:
    return all(_fits(value, part, steps) for part in given)


def _any_of(value: Any, given: Any, schema: dict[str, Any], steps: Steps) -> bool:
    return any(_fits(value, part, steps) for part in given)


def _one_of(value: Any, given: Any, schema: dict[str, Any], steps: Steps) -> bool:
    return sum(_fits(value, part, steps) for part in given) == 1


def _not(value: Any, given: Any, schema: dict[str, Any], steps: Steps) -> bool:
    return not _fits(value, given, steps)


def _reference(value: Any, given: Any, schema: dict[str, Any], steps: Steps) -> bool:
    return _fits(value, given, steps)


def _limit(
    applies: Callable[[Any], bool], holds: Callable[[Any, Any], bool]
) -> Callable[[Any, Any, dict[str, Any], Steps], bool]:
    return lambda value, given, schema, steps: not applies(value) or holds(value, given)


def _is_multiple(value: Any, of: Any) -> bool:
    if isinstance(of, float):
        return float(value / of).is_integer()
    return bool(value % of == 0)


_CHECKS: dict[str, Callable[[Any, Any, dict[str, Any], Steps], bool]] = {
    "$ref": _reference,
    "type": _type,
    "enum": _enum,
    "properties": _properties,
    "additionalProperties": _additional_properties,
    "required": _required,
    "items": _items,
    "prefixItems": _prefix_items,
    "allOf": _all_of,
    "anyOf": _any_of,
    "oneOf": _one_of,
    "not": _not,
    "minimum": _limit(_is_number, lambda value, given: value >= given),
    "maximum": _limit(_is_number, lambda value, given: value <= given),
    "exclusiveMinimum": _limit(_is_number, lambda value, given: value > given),
    "exclusiveMaximum": _limit(_is_number, lambda value, given: value < given),
    "multipleOf": _limit(_is_number, _is_multiple),
    "minLength": _limit(_OF_TYPE["string"], lambda value, given: len(value) >= given),
    "maxLength": _limit(_OF_TYPE["string"], lambda value, given: len(value) <= given),
    "minItems": _limit(_OF_TYPE["array"], lambda value, given: len(value) >= given),
    "maxItems": _limit(_OF_TYPE["array"], lambda value, given: len(value) <= given),
    "minProperties": _limit(_OF_TYPE["object"], lambda value, given: len(value) >= given),
    "maxProperties": _limit(_OF_TYPE["object"], lambda value, given: len(value) <= given),
}
