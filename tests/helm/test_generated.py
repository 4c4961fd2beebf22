"""What `make chart` writes is current, and what the schema lets through is what `hemostat serve` takes."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import ValidationError
from tests.support.helm_chart import CHART, ROOT

from hemostat import __version__
from hemostat.config.fields import Section
from hemostat.config.schema import Settings

Key = tuple[str, ...]


def by_path(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generator = by_path("chart_generator", ROOT / "deploy" / "chart.py")
schema = json.loads((CHART / "values.schema.json").read_text())
values = yaml.safe_load((CHART / "values.yaml").read_text())


def test_the_schema_is_current() -> None:
    text = (CHART / "values.schema.json").read_text()
    assert text == generator.schema(text), "a setting has changed: run `make chart`"


def test_the_chart_and_the_images_have_hemostats_version() -> None:
    text = (CHART / "Chart.yaml").read_text()
    assert text == generator.chart(text), "the version has changed: run `make chart`"
    read = yaml.safe_load(text)
    assert read["appVersion"] == __version__
    assert read["version"] == __version__.replace(".dev", "-dev.")
    named = re.findall(r"hemostat(?:-engine)?:(\d[\w.]*)", (ROOT / "docs" / "operations.md").read_text())
    assert set(named) == {__version__}


def test_the_readme_is_current() -> None:
    template, described = (CHART / "README.md.gotmpl").read_text(), (CHART / "README.md").read_text()
    wanted = generator.readme(template, (CHART / "values.yaml").read_text())
    assert described == wanted, "values.yaml or README.md.gotmpl has changed: run `make chart`"


def test_every_value_is_in_the_readme() -> None:
    described = set(re.findall(r"^\| `([\w.]+)` \| `", (CHART / "README.md").read_text(), re.MULTILINE))

    def missing(node: dict[str, Any], path: str = "") -> Iterator[str]:
        for name, value in node.items():
            key = f"{path}{name}"
            if key not in described:
                if isinstance(value, dict) and value:
                    yield from missing(value, f"{key}.")
                else:
                    yield key

    assert len(described) > 80
    assert list(missing(values)) == []


def test_a_table_of_some_values() -> None:
    text = """\
# -- One,
# or two | more.
a: 1
# no description
b:
  # -- In b.
  c: [x]
  d: {}
# -- All of e.
e:
  f: 1
"""
    assert list(generator.values(text)) == [
        ("a", "1", "One, or two | more."),
        ("b.c", '["x"]', "In b."),
        ("b.d", "{}", ""),
        ("e", '{"f": 1}', "All of e."),
    ]
    table = generator.readme("before\n" + generator.TABLE + "\nafter", text)
    assert table.splitlines()[3] == "| `a` | `1` | One, or two &#124; more. |"
    assert (table.splitlines()[0], table.splitlines()[-1]) == ("before", "after")


def test_every_value_has_a_type_in_the_schema() -> None:
    """And the other way round: what the schema names has a default, or is for a parent chart."""
    assert schema["properties"].keys() - values.keys() == {"enabled", "global"}
    for name, value in values.items():
        section = schema["properties"][name]
        if isinstance(value, dict) and value and "properties" in section:
            assert section["additionalProperties"] is False
            assert value.keys() == section["properties"].keys(), name


def leaves(model: type[Section], path: Key = ()) -> Iterator[Key]:
    for name, setting in model.model_fields.items():
        if isinstance(setting.annotation, type) and issubclass(setting.annotation, Section):
            yield from leaves(setting.annotation, (*path, name))
        else:
            yield (*path, name)


def schema_leaves(node: dict[str, Any], path: Key = ()) -> Iterator[Key]:
    for name, value in node.get("properties", {}).items():
        if "properties" in value:
            yield from schema_leaves(value, (*path, name))
        else:
            yield (*path, name)


def test_the_schema_knows_the_keys_that_serve_knows() -> None:
    charts_own = {("listen", "host"), ("listen", "port"), ("admin", "host"), ("admin", "port")}
    charts_own |= {("upstream", "url"), ("upstream", "urls")}
    charts_own |= {key for key in leaves(Settings) if key[0] == "control"}
    assert set(schema_leaves(schema["definitions"]["config"])) == set(leaves(Settings)) - charts_own


FILES = {
    *(("upstream", "ca"), ("canaries", "file")),
    *(("reference", "folder"), ("run_dir",), ("spool", "path")),
    *(
        ("admin", "token_file"),
        ("admin", "engine_token_file"),
        ("upstream", "api_key_file"),
        ("reference", "api_key_file"),
        ("store", "url_file"),
    ),
}
"""They have to exist in the pod."""
# fmt: off
TRIED: list[object] = [
    None, True, False, -1, 0, 1, 0.5, 2, 7, 64, 2_000, 70_000, 10**12, 1e15, "", " ", "x", "0.5", "on", "a b", "é",
    "http://a:8000", "http://a/v1", "ftp://a", "http://u:p@a", "memory://", "memory:", "sqlite:///x", "sqlite://",
    "postgresql://a:5432/h", "postgres://a", "amqp://a", "cpu", "cuda:1", "cuda:x", "auto", "off", "none", "vllm",
    "other",
    "bfloat16",
    "pooled", "route", "engine", "request", "INFO", "info", "json", [], ["a"], ["a", "a"], [""], ["a b"], [1],
    {}, {"a": 1}, "address", "stdout", "/var/log/access.log", "now", "report",
]
# fmt: on


def both(key: Key, value: object) -> tuple[bool, bool]:
    """Whether the schema, and whether `serve`, takes this value of this key."""
    config: Any = value
    for name in reversed(key):
        config = {name: config}
    chart = not list(jsonschema.Draft7Validator(schema["definitions"]["config"]).iter_errors(config))
    rest: dict[str, Any] = {"upstream": {"url": "http://a"}, "labels": ["l"], "admin": {"token": "t"}}
    for name, part in config.items():
        rest[name] = rest[name] | part if isinstance(part, dict) and isinstance(rest.get(name), dict) else part
    if key == ("reference", "backend"):  # what the other keys have to be then is a rule of its own, in both
        rest["reference"] |= {"url": "http://a", "model": "m"}
    if key == ("reasoning", "start"):
        rest["reasoning"] |= {"end": [1]}
    try:
        Settings.model_validate(rest)
    except ValidationError:
        return chart, False
    return chart, True


@pytest.mark.parametrize("key", sorted(set(schema_leaves(schema["definitions"]["config"])) - FILES), ids=".".join)
def test_what_the_chart_lets_through_serve_takes(key: Key) -> None:
    results = {repr(value): both(key, value) for value in TRIED}
    assert [value for value, (chart, taken) in results.items() if chart and not taken] == []
    assert {chart for chart, _ in results.values()} == {True, False}, "nothing tried fits, or everything does"


def test_serves_defaults_are_let_through() -> None:
    defaults = Settings.model_validate({"upstream": {"url": "http://a"}}).plain()
    for section, own in {
        "listen": None,
        "control": None,
        "admin": ("host", "port"),
        "upstream": ("url", "urls"),
    }.items():
        if own is None:
            del defaults[section]
        else:
            defaults[section] = {key: value for key, value in defaults[section].items() if key not in own}
    jsonschema.Draft7Validator(schema["definitions"]["config"]).validate(defaults)
