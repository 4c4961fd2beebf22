"""Features of JSON schemas for which vLLM 0.32 takes another backend than xgrammar
(`v1/structured_output/backend_xgrammar.py`, `has_xgrammar_unsupported_json_features`)."""

from __future__ import annotations

from typing import Any

_FORMATS = frozenset(
    {
        *("email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid", "uri"),
        *("uri-reference", "uri-template", "json-pointer", "relative-json-pointer"),
    }
)
_ARRAY_KEYS = ("uniqueItems", "contains", "minContains", "maxContains")


def needs_other_backend(schema: object) -> bool:
    """Whether any object in the schema has such a feature; RecursionError where it is nested too deeply.

    >>> needs_other_backend({"properties": {"a": {"type": "number", "multipleOf": 2}}}), needs_other_backend({"a": 1})
    (True, False)
    """
    if not isinstance(schema, dict):
        return False
    if _has_one(schema):
        return True
    for value in schema.values():
        if isinstance(value, dict):
            if needs_other_backend(value):
                return True
        elif isinstance(value, list) and any(needs_other_backend(item) for item in value):
            return True
    return False


def _has_one(schema: dict[str, Any]) -> bool:
    types = _types(schema)
    if types & {"integer", "number"} and "multipleOf" in schema:
        return True
    if "array" in types and any(key in schema for key in _ARRAY_KEYS):
        return True
    form = schema.get("format", "email")
    if "string" in types and (not isinstance(form, str) or form not in _FORMATS or _bounded_pattern(schema)):
        return True
    if "object" in types:
        names, patterns = schema.get("propertyNames"), schema.get("patternProperties")
        if "propertyNames" in schema and (
            (isinstance(names, dict) and _bounded_pattern(names))
            or "patternProperties" in schema
            or "properties" in schema
            or schema.get("unevaluatedProperties", True) is not True
        ):
            return True
        if isinstance(patterns, dict) and ("properties" in schema or len(patterns) > 1):
            return True
    branches = schema.get("allOf")
    return isinstance(branches, list) and len(branches) > 1


def _types(schema: dict[str, Any]) -> set[str]:
    found = schema.get("type")
    if isinstance(found, str):
        return {found}
    return {item for item in found if isinstance(item, str)} if isinstance(found, list) else set()


def _bounded_pattern(schema: dict[str, Any]) -> bool:
    return ("pattern" in schema or "format" in schema) and ("minLength" in schema or "maxLength" in schema)
