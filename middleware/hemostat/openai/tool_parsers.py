"""Which grammar vLLM 0.32 makes of tools, by the name that its `--tool-call-parser` has.

A parser either forces calls by a JSON schema of the tools, or by a structural tag in the model's own syntax, which it
also applies to calls that the model is free to make, where a tool is strict or calls are limited to one. The rest has
rules of its own, which Hemostat does not rebuild.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

JSON_SCHEMA = "json_schema"
"""The format of a parser without a structural tag."""

TOOL_FORMATS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                *("ernie45", "granite-20b-fc", "granite", "granite4", "hunyuan_a13b", "internlm", "jamba"),
                *("llama4_pythonic", "olmo3", "phi4_mini_json", "pythonic", "xlam"),
            ),
            JSON_SCHEMA,
        ),
        "hermes": "hermes",
        "qwen3_json": "hermes",
        "longcat": "longcat",
        "llama3_json": "llama",
        "llama4_json": "llama",
        "kimi_k2": "kimi",
        "deepseek_v3": "deepseek_r1",
        "deepseek_v31": "deepseek_v3_1",
        "deepseek_v32": "deepseek_v3_2",
        "deepseek_v4": "deepseek_v4",
        "deepseek_v41": "deepseek_v4_1",
        "qwen3_coder": "qwen_3_coder",
        "qwen3_xml": "qwen_3_coder",
        "step3p5": "qwen_3_coder",
        "mimo": "mimo",
    }
)
"""Parser -> the structural tag's model in xgrammar or vLLM, or `JSON_SCHEMA`."""

RESTRICTING_PARSERS = frozenset({"glm45", "glm47"})
"""Parsers that restrict every call at the server's level `auto`, as other parsers do at `function`."""


def restricted_free_calls(parser: str | None, strict_level: str) -> str:
    """Which calls that the model is free to make vLLM restricts: "never", "always" or "strict" (where a tool is strict
    or at most one call is allowed); where the parser is not known, as if it had a structural tag.

    >>> [restricted_free_calls(*one) for one in (("hermes", "auto"), ("pythonic", "auto"), ("glm47", "auto"))]
    ['strict', 'never', 'always']
    """
    if TOOL_FORMATS.get(parser or "") == JSON_SCHEMA:
        return "never"
    return "strict" if strict_level == "auto" and parser not in RESTRICTING_PARSERS else "always"
