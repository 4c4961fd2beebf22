"""Settings as a commented YAML file, from which `load` makes the same settings."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import yaml

from hemostat.config.loading import SECRETS_IN_FILES
from hemostat.config.schema import Settings
from hemostat.config.text import one_line

COMMENTS = {
    ("upstream", "url"): "vLLM with the compressed model",
    ("reference", "backend"): "of the uncompressed model: vllm (a server) or transformers (a process here)",
    ("shadow", "rate"): "fraction of the requests that are scored on the reference",
    ("shadow", "top_k"): "at most --max-logprobs of vLLM",
    ("calibration", "mode"): "observe: learns and reports; auto: also serves what is proven to help; off",
    ("listen", "port"): "clients",
    ("admin", "port"): "console, /metrics",
    ("admin", "token"): "for changes on the console",
    ("admin", "engine_token"): "HEMOSTAT_ENGINE_TOKEN of a vLLM with the plugin",
    ("store", "url"): "sqlite:////var/lib/hemostat/hemostat.db outlasts a restart",
}
"""The settings that a file always has, in this order, as these are changed first; of all others it has what is not the
default."""
COMMENT_COLUMN = 42
_DEFAULTS = Settings.model_validate({"upstream": {"url": "http://none"}}).plain()
_DEFAULTS["upstream"]["url"] = None


class _Dumper(yaml.SafeDumper):
    """Writes every value on one line: a text with line ends or other unprintable characters gets escapes."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)


def render(settings: Settings, name: str) -> str:
    """Returns the text of the file, from which `load` makes equal settings. name: what the file will be called."""
    values = settings.plain()
    file = shlex.quote(one_line(name))
    lines = [f"# Start: hemostat serve --config {file}; try both models: hemostat check --config {file}"]
    for section in dict.fromkeys([*(first for first, _ in COMMENTS), *values]):
        if not isinstance(_DEFAULTS[section], dict):
            if values[section] != _DEFAULTS[section]:
                lines.append(_line((section,), values[section]))
        elif kept := list(_kept(section, values[section])):
            lines += [f"{section}:", *(_line((section, key), value) for key, value in kept)]
    return "\n".join(lines) + "\n"


def _kept(section: str, values: dict[str, object]) -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        read_from_file = (section, key) in SECRETS_IN_FILES and values[f"{key}_file"] is not None
        changed = value != _DEFAULTS[section][key]
        # A null is written where the default is another value.
        if not read_from_file and (changed or (value is not None and (section, key) in COMMENTS)):
            yield key, value


def _line(key: tuple[str, ...], value: object) -> str:
    # Flow style: a mapping or a list on one line, too.
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10**6, sort_keys=False)
    line = f"{'  ' * (len(key) - 1)}{key[-1]}: {text.removesuffix(chr(10)).removesuffix(chr(10) + '...')}"
    # YAML begins a comment only where a space is before the #.
    return f"{line:<{COMMENT_COLUMN - 1}} # {COMMENTS[key]}" if key in COMMENTS else line
