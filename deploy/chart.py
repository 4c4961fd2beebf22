"""`make chart`: writes the generated files of helm/hemostat.

Chart.yaml          its versions are Hemostat's
README.md           README.md.gotmpl with a table of values.yaml and its comments `# -- …`, which is helm-docs' form
values.schema.json  its definitions/config, from the settings that `hemostat serve` validates its file with
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from hemostat import __version__
from hemostat.config.reasoning_parsers import PARSERS
from hemostat.config.schema import Settings
from hemostat.config.store_url import POSTGRES

CHART = Path(__file__).resolve().parents[1] / "helm" / "hemostat"
TABLE = '{{ template "chart.valuesTable" . }}'
WIDTH = 118

URL = r"^https?://[^/@?#\s]+/?$"
NETWORK = r"^([0-9]{1,3}(\.[0-9]{1,3}){3}|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*)(/[1-9][0-9]{0,2})?$"
STORE = r"^(memory://$|sqlite:///.+|(" + "|".join(sorted(POSTGRES)) + ")://.+)"
CHARTS_OWN = {
    *(("listen",), ("control",), ("admin", "host"), ("admin", "port")),
    *(("upstream", "url"), ("upstream", "urls")),
}
"""Keys that the chart sets itself."""
SECRET = {"pattern": "^[!-~]+$", "maxLength": 4096}
CHECKED_BY_CODE: dict[tuple[str, ...], dict[str, Any]] = {
    ("admin", "allowed_hosts"): {"items": {"type": "string", "pattern": "^[A-Za-z0-9_.:%-]{1,255}$"}},
    ("client_limits", "trusted_proxies"): {"items": {"type": "string", "pattern": NETWORK}},
    ("admin", "token"): SECRET,
    ("admin", "engine_token"): SECRET,
    # YAML 1.1 reads an unquoted off as false.
    ("log", "access"): {"type": ["string", "boolean"], "pattern": "^(off$|stdout$|/)", "not": {"const": True}},
    ("labels",): {"items": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"}, "uniqueItems": True},
    ("reference", "api_key"): SECRET,
    ("reference", "device"): {"pattern": r"^(auto|cpu|cuda(:\d+)?|xpu(:\d+)?|mps)$"},
    ("reference", "url"): {"pattern": URL},
    ("evidence", "client_header"): {"pattern": "^[A-Za-z0-9_-]{1,64}$"},
    ("reference", "models", "*"): {"required": ["model"]},
    ("reference", "models", "*", "url"): {"pattern": URL},
    ("reference", "models", "*", "device"): {"pattern": r"^(auto|cpu|cuda(:\d+)?|xpu(:\d+)?|mps)$"},
    ("gate", "candidate"): {"pattern": r"^https?://[^/@?#\s]+/?(#[^@\s]+)?$"},
    ("upstream", "api_key"): SECRET,
    ("tracing", "endpoint"): {"pattern": URL},
    ("store", "url"): {"pattern": STORE},
    ("calibration", "mode"): {"enum": ["off", "observe", "auto", False]},  # YAML 1.1 reads an unquoted off as false
    ("reference", "backend"): {"enum": ["none", "vllm", "transformers", None]},
    ("reasoning", "parser"): {"enum": ["auto", "none", *PARSERS]},
}
"""Constraints that validators check and pydantic's schema does not contain."""


def config_schema() -> dict[str, Any]:
    """JSON Schema of the value `config`, written so that its error messages are easy to understand."""
    schema = Settings.model_json_schema()
    return _plain(schema, schema["$defs"], ())


def _plain(node: dict[str, Any], definitions: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    if "$ref" in node:
        node = definitions[node["$ref"].rpartition("/")[2]]
    if "anyOf" in node:  # Optional[X]: one type with null, because the message "anyOf failed" is unclear
        (kind,) = (option for option in node["anyOf"] if option != {"type": "null"})
        node = kind | {"type": [kind["type"], "null"]}
    kept = {key: node[key] for key in node.keys() - {"title", "default", "description", "format", "writeOnly", "$defs"}}
    if "properties" in kept:
        kept["properties"] = {
            name: _plain(value, definitions, (*path, name))
            for name, value in node["properties"].items()
            if (*path, name) not in CHARTS_OWN
        }
        kept["type"] = ["object", "null"]  # null: a section whose keys are all commented out
        kept.pop("required", None)
    values = kept.get("additionalProperties")
    if isinstance(values, dict):  # a mapping of any names; a text in place of a value is its first key
        of = _plain(values, definitions, (*path, "*"))
        kept["additionalProperties"] = of | {"type": ["object", "string"], "minLength": 1}
    kept |= CHECKED_BY_CODE.get(path, {})
    if "type" in kept and "number" in _types(
        kept
    ):  # helm's --set reads 0.5 as a string; the settings convert strings to numbers
        kept["type"] = list(dict.fromkeys(["number", "string", *_types(kept)]))
        fraction = 1 in (kept.get("maximum"), kept.get("exclusiveMaximum"))
        kept["pattern"] = (
            r"^(0|1|0?\.[0-9]+)$"
            if fraction
            else r"^[1-9][0-9]*(\.[0-9]+)?$"
            if kept.get("minimum") == 1
            else r"^[0-9]+(\.[0-9]+)?$"
        )
    if "enum" in kept:
        kept.pop("type", None)
    return dict(sorted(kept.items()))


def _types(node: dict[str, Any]) -> list[str]:
    return [node["type"]] if isinstance(node["type"], str) else node["type"]


def schema(text: str) -> str:
    """The text of values.schema.json with definitions/config replaced by the schema of the settings."""
    whole = json.loads(text)
    whole["definitions"]["config"] = config_schema()
    return _compact(whole) + "\n"


def _compact(value: Any, indent: str = "", before: int = 0) -> str:
    """JSON in which every value that fits on one line is on one line.

    before: characters that precede the value on its line.
    """
    line = json.dumps(value, ensure_ascii=False)
    if len(indent) + before + len(line) <= WIDTH or not value or not isinstance(value, dict | list):
        return line
    deeper = indent + "  "
    if isinstance(value, dict):
        parts = [f"{deeper}{json.dumps(key)}: {_compact(part, deeper, len(key) + 4)}" for key, part in value.items()]
    else:
        parts = [deeper + _compact(part, deeper) for part in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n" + ",\n".join(parts) + f"\n{indent}{closing}"


def values(text: str) -> Iterator[tuple[str, str, str]]:
    """(dotted key, default as JSON, comment) of each leaf, and of each mapping that has a comment.

    A leaf of a mapping with a comment has its own row only if it has its own comment.
    """
    root = yaml.compose(text, yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    yield from _values(root, text.splitlines(), (), covered=False)


def _values(
    node: yaml.MappingNode, lines: list[str], path: tuple[str, ...], *, covered: bool
) -> Iterator[tuple[str, str, str]]:
    for key_node, value_node in node.value:
        key = (*path, key_node.value)
        comment = _comment_above(lines, key_node.start_mark.line)
        if comment or not covered:
            value = yaml.SafeLoader("").construct_document(value_node)
            descend = isinstance(value_node, yaml.MappingNode) and value_node.value and not value_node.flow_style
            if comment or not descend:
                yield ".".join(key), json.dumps(value, ensure_ascii=False), comment
            if descend:
                yield from _values(value_node, lines, key, covered=bool(comment))
        elif isinstance(value_node, yaml.MappingNode):
            yield from _values(value_node, lines, key, covered=True)


def _comment_above(lines: list[str], line: int) -> str:
    """The comment directly above `line`, from its `# -- ` on; empty if there is none."""
    words: list[str] = []
    while line > 0 and (match := re.match(r"\s*# ?(.*)", lines[line - 1])):
        line -= 1
        if match[1].startswith("-- "):
            return " ".join([match[1][3:], *words])
        words.insert(0, match[1])
    return ""


def readme(template: str, values_yaml: str) -> str:
    """README.md: the template with the table of values."""
    rows = "\n".join(
        f"| `{key}` | `{default}` | {comment.replace('|', '&#124;')} |".replace(" |  |", " | |")
        for key, default, comment in values(values_yaml)
    )
    return template.replace(TABLE, f"| value | default | |\n|---|---|---|\n{rows}")


def semantic(version: str) -> str:
    """Returns a version of Python as a semantic version, which helm needs.

    >>> semantic("0.3.0"), semantic("0.3.0.dev0")
    ('0.3.0', '0.3.0-dev.0')
    """
    return re.sub(r"\.dev(\d+)$", r"-dev.\1", version)


def chart(text: str) -> str:
    """Returns the text of Chart.yaml with Hemostat's version. The images have the same tag as appVersion."""
    text = re.sub(r"^version: .*$", f"version: {semantic(__version__)}", text, flags=re.MULTILINE)
    return re.sub(r"^appVersion: .*$", f'appVersion: "{__version__}"', text, flags=re.MULTILINE)


def main() -> None:
    """Write all of them."""
    (CHART / "Chart.yaml").write_text(chart((CHART / "Chart.yaml").read_text()))
    described = readme((CHART / "README.md.gotmpl").read_text(), (CHART / "values.yaml").read_text())
    (CHART / "README.md").write_text(described)
    (CHART / "values.schema.json").write_text(schema((CHART / "values.schema.json").read_text()))


if __name__ == "__main__":
    main()
