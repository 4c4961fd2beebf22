"""Loads the configuration: one YAML file, then `HEMOSTAT_…` environment variables (nested with `__`), then flags."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from hemostat.config.errors import REMOVED, ConfigError, explain, nearest
from hemostat.config.schema import LEAVES, SECTIONS, Settings
from hemostat.config.text import Key, dotted_key, one_line, short_repr

ENV_PREFIX = "HEMOSTAT_"
FOREIGN_VARIABLES = frozenset(
    {
        *("HEMOSTAT_ADMIN_URL", "HEMOSTAT_ADMIN_TOKEN", "HEMOSTAT_ENGINE_TOKEN"),
        *("HEMOSTAT_PROFILE_DIR", "HEMOSTAT_VLLM"),
        *("HEMOSTAT_ADAPTERS", "HEMOSTAT_ADAPTER_DIR", "HEMOSTAT_ADAPTERS_CPU_PRODUCT"),
    }
)
"""The variables with the same prefix that are not settings: the engine plugin, the commands and make read them."""
_KUBERNETES_NAME = re.compile(r"_SERVICE_(HOST|PORT)(_[A-Z0-9_]+)?$|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$")
_KUBERNETES_VALUE = re.compile(r"(tcp|udp|sctp)://")
MAX_FILE_BYTES = 1024 * 1024
SECRETS_IN_FILES = (
    *(("admin", "token"), ("admin", "engine_token"), ("control", "token")),
    *(("upstream", "api_key"), ("reference", "api_key"), ("store", "url")),
)
"""The settings that the file named by `…_file` can hold in their place."""
MAX_SECRET_BYTES = 4096


def load(
    path: Path | None,
    env: Mapping[str, str] | None = None,
    overrides: Iterable[tuple[str, str] | tuple[str, str, str]] = (),
) -> Settings:
    """Returns the settings from the file, environment variables and flags; the later ones win. Raises ConfigError.

    path: None without a file. env: None for the environment of this process. overrides: flags, as (dotted key,
    text), and what an error names as their source if that is not `--set`.
    """
    data, places = _read(path) if path is not None else ({}, {})
    for name, text in sorted((os.environ if env is None else env).items()):
        if name.startswith(ENV_PREFIX) and not _foreign(name, text):
            _set_value(data, places, name.removeprefix(ENV_PREFIX).lower().split("__"), text, name)
    for key, text, *flag in overrides:
        _set_value(data, places, key.split("."), text, flag[0] if flag else f"--set {key}")
    for secret in SECRETS_IN_FILES:
        _read_secret(data, places, secret)
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, path, places)) from None


def _read(path: Path) -> tuple[dict[str, Any], dict[Key, str]]:
    """Returns the file's mapping, and for every key in it the file and line, for errors."""
    name = one_line(str(path))
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{name}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"{name}: longer than {MAX_FILE_BYTES} bytes")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: not UTF-8 (byte {error.start})") from None
    places: dict[Key, str] = {}
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return {}, places
        _note_lines(node, (), name, places, set())
        data = loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark is not None else name
        raise ConfigError(f"{where}: not YAML: {one_line(getattr(error, 'problem', None) or str(error))}") from None
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        # PyYAML's constructors raise these for a value that does not fit its tag (2024-13-45, !!int "").
        raise ConfigError(f"{name}: not YAML: {one_line(str(error))}") from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deep") from None
    if not isinstance(data, dict):
        raise ConfigError(
            f"{name}: holds {short_repr(data)}; a mapping is expected, such as `upstream:` with `url:` in it"
        )
    # A section whose keys are all commented out is null.
    return {k: {} if v is None and k in SECTIONS else v for k, v in data.items()}, places


def _note_lines(node: yaml.Node, key: Key, name: str, places: dict[Key, str], seen: set[int]) -> None:
    """Notes the line of every key; raises ConfigError for a duplicate (YAML would silently use the last)."""
    if id(node) in seen or not isinstance(node, yaml.MappingNode):
        return
    seen.add(id(node))
    for key_node, value_node in node.value:
        where = f"{name}:{key_node.start_mark.line + 1}"
        merge = key_node.tag == "tag:yaml.org,2002:merge"
        if not merge and key_node.tag != "tag:yaml.org,2002:str":
            raise ConfigError(one_line(f"{where}: {short_repr(key_node.value)}: unknown key; every key is a word"))
        child = (*key, str(key_node.value))
        if child in places and not merge:
            raise ConfigError(f"{where}: {dotted_key(child)}: duplicate key")
        places[child] = where
        _note_lines(value_node, child, name, places, seen)


def _set_value(data: dict[str, Any], places: dict[Key, str], parts: list[str], text: str, source: str) -> None:
    """Sets one value that comes from the environment or a flag."""
    dotted = ".".join(parts)
    if dotted in REMOVED:
        raise ConfigError(one_line(f"{source}: {REMOVED[dotted]}"))
    if dotted not in LEAVES:
        below = [leaf for leaf in LEAVES if leaf.startswith(dotted + ".")]
        near = (
            below[0] if below else nearest(dotted.replace("_", "."), {leaf.replace("_", "."): leaf for leaf in LEAVES})
        )
        hint = f"; did you mean {_spelled(near, source)}?" if near else ""
        what = "a section, not a key" if below else "unknown"
        if "@" in text and source.startswith("--set ") and not below:
            # An address that was given without its key may have an = in its user or password.
            source = "--set KEY=VALUE: the key is not shown, as it may be a part of an address"
        raise ConfigError(one_line(f"{source}: {what}{hint}"))
    into = data
    for n, part in enumerate(parts[:-1], 1):
        if into.get(part) is None:
            into[part] = {}
        into = into[part]
        if not isinstance(into, dict):
            section = tuple(parts[:n])
            raise ConfigError(
                f"{places.get(section, source)}: {dotted_key(section)}: {short_repr(into)} is not a mapping"
            )
    into[parts[-1]] = _from_text(text, LEAVES[dotted])
    places[tuple(parts)] = source.partition(" ")[0]


def _read_secret(data: dict[str, Any], places: dict[Key, str], key: tuple[str, str]) -> None:
    """Reads the secret from `…_file`, if that is set; a missing file is left to the validation."""
    section, name = key
    values = data.get(section)
    if not isinstance(values, dict):
        return
    path = values.get(f"{name}_file")
    if not isinstance(path, str) or not os.path.isfile(path):
        return
    dotted = dotted_key((section, f"{name}_file"))
    where = places.get((section, f"{name}_file"), "configuration")
    if values.get(name) is not None:
        raise ConfigError(one_line(f"{where}: {dotted}: does not go with {section}.{name}; leave one of them out"))
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_SECRET_BYTES + 1)
        text = raw.decode("ascii").strip()
    except OSError as error:
        raise ConfigError(one_line(f"{where}: {dotted}: cannot be read ({error.strerror})")) from None
    except UnicodeDecodeError:
        text = ""
    if not text or len(raw) > MAX_SECRET_BYTES:
        raise ConfigError(one_line(f"{where}: {dotted}: {short_repr(path)} does not hold one line of printable ASCII"))
    values[name] = text
    places[key] = f"{where}: {dotted}"


def secret_from_environment(section: str, name: str, environment: Mapping[str, str]) -> str | None:
    """Returns the secret that `HEMOSTAT_SECTION__NAME` holds, or the file that `…_FILE` names, as `load` reads them.

    None if neither is set. Raises ConfigError if both are, or the file does not hold it.
    """
    values: dict[str, Any] = {}
    places: dict[Key, str] = {}
    for field in (name, f"{name}_file"):
        variable = f"{ENV_PREFIX}{section}__{field}".upper()
        if text := environment.get(variable):
            values[field], places[section, field] = text, variable
    _read_secret({section: values}, places, (section, name))
    file = values.get(f"{name}_file")
    if file is not None and name not in values:
        raise ConfigError(one_line(f"{places[section, f'{name}_file']}: {short_repr(file)}: there is no such file"))
    return values.get(name)


def _from_text(text: str, annotation: object) -> object:
    """Returns the value of a text from the environment or a flag. pydantic converts numbers and booleans, and this
    function all else.
    """
    if text.strip().lower() in {"", "null"} and type(None) in get_args(annotation):
        return None
    if get_origin(annotation) is list:
        # What is before an @ is a user and a password, with whatever commas: it is refused as a whole, and not shown.
        user, at, rest = text.strip().strip("[]").rpartition("@")
        first, *others = rest.split(",")
        return [part.strip() for part in (user + at + first, *others) if part.strip()]
    if get_origin(annotation) is dict:
        pairs = (part.partition("=") for part in text.strip().strip("{}").split(",") if part.strip())
        return {name.strip(): value.strip() for name, _, value in pairs}
    return text


def _spelled(dotted: str, source: str) -> str:
    return dotted if source.startswith("--") else ENV_PREFIX + dotted.upper().replace(".", "__")


def _foreign(name: str, text: str) -> bool:
    """Returns True for variables of Hemostat's other parts, and those that Kubernetes makes of a Service called
    hemostat."""
    return (
        name in FOREIGN_VARIABLES
        or _KUBERNETES_NAME.search(name) is not None
        or (name.endswith("_PORT") and _KUBERNETES_VALUE.match(text) is not None)
    )
