"""The bounded validator against `jsonschema`, and that its bounds hold."""

import json

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.support.slow import examples

from hemostat.relay.schema_check import MAX_SCHEMA_BYTES, MAX_SCHEMA_NODES, Schema, Steps

NAMES = st.sampled_from(["a", "b", "c"])
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([0.5, 1.0, 2.5]), st.text("ab", max_size=3)
)
VALUES = st.recursive(
    SCALARS, lambda v: st.one_of(st.lists(v, max_size=3), st.dictionaries(NAMES, v, max_size=3)), max_leaves=6
)
TYPES = st.sampled_from(["null", "boolean", "integer", "number", "string", "array", "object"])
SIZES = st.integers(0, 3)


def keywords(inner):
    some = st.lists(inner, min_size=1, max_size=3)
    return st.fixed_dictionaries(
        {},
        optional={
            "type": st.one_of(TYPES, st.lists(TYPES, min_size=1, max_size=3, unique=True)),
            "enum": st.lists(VALUES, min_size=1, max_size=3),
            "const": VALUES,
            "properties": st.dictionaries(NAMES, inner, max_size=3),
            "required": st.lists(NAMES, max_size=2, unique=True),
            "additionalProperties": inner,
            "items": inner,
            "prefixItems": some,
            "allOf": some,
            "anyOf": some,
            "oneOf": some,
            "not": inner,
            "minimum": st.integers(-3, 3),
            "exclusiveMaximum": st.sampled_from([0, 1, 1.5]),
            "multipleOf": st.sampled_from([1, 2, 0.5]),
            "minLength": SIZES,
            "maxItems": SIZES,
            "minProperties": SIZES,
            "title": st.just("a title"),
            "format": st.just("date"),
            "$ref": st.sampled_from(["#/$defs/one", "#/$defs/two"]),
        },
    )


SCHEMAS = st.recursive(st.one_of(st.booleans(), keywords(st.booleans())), keywords, max_leaves=4)
DEFINITIONS = st.fixed_dictionaries(
    {"one": keywords(st.booleans()).map(lambda s: {k: v for k, v in s.items() if k != "$ref"}), "two": st.booleans()}
)


@settings(max_examples=examples(200), deadline=None)
@given(SCHEMAS, DEFINITIONS, VALUES)
@example({"enum": [1, True]}, {"one": {}, "two": True}, 1.0)
@example({"const": True}, {"one": {}, "two": True}, 1)
@example({"type": "integer"}, {"one": {}, "two": True}, 1.0)
@example({"prefixItems": [True], "items": False}, {"one": {}, "two": True}, [1, 2])
@example({"$ref": "#/$defs/two", "type": "string"}, {"one": {}, "two": False}, "a")
def test_it_decides_as_jsonschema_does(schema, definitions, value):
    whole = {**schema, "$defs": definitions} if isinstance(schema, dict) else schema
    expected = jsonschema.Draft202012Validator(whole).is_valid(value)
    assert Schema(json.dumps(whole).encode()).fits(value, Steps(10**6)) is expected


@pytest.mark.parametrize(
    "schema",
    [
        {"pattern": "(a+)+$"},
        {"properties": {"x": {"patternProperties": {"a": True}}}},
        {"$ref": "https://example.org/schema"},
        {"$ref": "#"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}},
        {"$ref": "#/$defs/missing"},
        {"uniqueItems": True},
        {"items": [{"type": "string"}]},
        {"enum": list(range(MAX_SCHEMA_NODES + 1))},
        {"type": "text"},
        {"minimum": "3"},
        {"anyOf": []},
        {"multipleOf": 0},
        [],
        7,
    ],
)
def test_what_it_does_not_evaluate(schema):
    assert Schema(json.dumps(schema).encode()).fits(3, Steps()) is None


@pytest.mark.parametrize(
    "raw", [b"", b"{", b'{"a": "\xff"}', b'"{"', b"[" * 5000, b" " * (MAX_SCHEMA_BYTES + 1) + b"{}"]
)
def test_what_is_no_schema(raw):
    assert Schema(raw).fits(3, Steps()) is None


def test_a_schema_in_a_string():
    assert Schema(json.dumps('{"type": "string"}').encode()).fits(3, Steps()) is False


def test_references_that_expand_exponentially_end():
    definitions = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(30)}
    schema = {"$ref": "#/$defs/d0", "$defs": {**definitions, "d30": {"type": "string"}}}
    assert Schema(json.dumps(schema).encode()).fits("x", Steps()) is None


def test_an_answer_has_a_number_of_steps():
    schema = Schema(json.dumps({"items": {"anyOf": [{"type": "string"}] * 400}}).encode())
    steps = Steps(5_000)
    assert schema.fits([1], steps) is False
    assert schema.fits(["a"] * 2_000, steps) is None
    assert steps.left < 0
