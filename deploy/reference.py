"""`make docs`: writes docs/reference/ from the code, the rules of the alerts, and the texts in both.

The pages are committed, so that links to them work on a code host; a test compares them with the code.

What a page says about an item is the text where the item is defined: below a setting, in an argument's help, in a
route's docstring, in a metric's declaration, in a rule's annotations, in an error's message. tests/deploy/test_docs.py
checks that each item has one.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from fastapi.routing import APIRoute

import metrics
from hemostat.admin.access import ACCESS, Access, Tokens
from hemostat.admin.app import create_app
from hemostat.cli import commands
from hemostat.commands.arguments import EXIT_INTERRUPTED, Parser
from hemostat.config.fields import Section
from hemostat.config.models import ModelReference
from hemostat.config.schema import Settings
from hemostat.control.process import EXIT_CODE_SUPERSEDED
from hemostat.openai.routes import ROUTES, Support

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "reference"
RULES = ROOT / "helm" / "hemostat" / "rules" / "hemostat.yaml"

SEE = {
    "upstream": "[several engines](../engines.md)",
    "admin": "[who may do what](../operations.md#access-and-secrets)",
    "control": "[planes](../planes.md)",
    "reference": "[on its own machine](../configuration.md#a-reference-on-its-own-machine), [several served models]"
    "(../configuration.md#several-served-models)",
    "reasoning": "[long contexts and thinking](../reading-the-figures.md#long-contexts-and-thinking)",
    "shadow": "[coverage](../reading-the-figures.md#coverage)",
    "calibration": "[calibration](../calibration.md)",
    "evidence": "[effective requests](../reading-the-figures.md#effective-requests)",
    "adapter": "[adapters](../operations.md#adapters)",
    "store": "[what is kept](../operations.md#what-is-kept-over-a-restart), [PostgreSQL](../postgresql.md)",
    "limits": "[what clients share](../configuration.md#what-clients-share)",
    "client_limits": "[limits for each client](../configuration.md#limits-for-each-client)",
    "gate": "[the live gate](../gate.md#live)",
    "alarm": "[what an alarm means](../reading-the-figures.md#what-an-alarm-means)",
    "log": "[logs and traces](../operations.md#logs-and-traces)",
    "tracing": "[logs and traces](../operations.md#logs-and-traces)",
}
"""Section of the settings -> pages about it."""


def write(folder: Path) -> None:
    """All pages."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, page in PAGES.items():
        (folder / name).write_text(page(), encoding="utf-8")


def cell(text: str) -> str:
    """The text in a cell of a table."""
    return " ".join(text.split()).replace("||", "‖").replace("|", "\\|")


def table(*head: str, rows: Iterator[tuple[str, ...]] | list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join(lines + [f"| {' | '.join(map(cell, row))} |" for row in rows]) + "\n"


# --- settings ---------------------------------------------------------------------------------------------------------


def settings() -> str:
    parts = [
        "# Settings\n\nMade by `make docs` from `middleware/hemostat/config/`. How they are set, and which to "
        "consider first: [configuration](../configuration.md).\n"
    ]
    top = {name: field for name, field in Settings.model_fields.items() if not section(field.annotation)}
    parts.append("## Without a section\n\n" + setting_rows(Settings, list(top)))
    for name, field in Settings.model_fields.items():
        if kind := section(field.annotation):
            see = f" See {SEE[name]}." if name in SEE else ""
            parts.append(f"## {name}\n\n{inspect.getdoc(kind)}{see}\n\n{setting_rows(kind)}")
    parts.append(
        f"### A value of reference.models\n\n{inspect.getdoc(ModelReference)}\n\n{setting_rows(ModelReference)}"
    )
    return "\n".join(parts)


def section(annotation: Any) -> type[Section] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def setting_rows(kind: type[Section], names: list[str] | None = None) -> str:
    """A table of the section's settings, or of these."""
    texts, schema = field_texts(kind), kind.model_json_schema()
    rows = []
    for name in names or list(kind.model_fields):
        field = kind.model_fields[name]
        default = "required" if field.is_required() else shown(field.get_default())
        rows.append((f"`{name}`", values(schema["properties"][name], schema), default, texts.get(name, "")))
    return table("key", "values", "default", "", rows=rows)


def shown(value: Any) -> str:
    return "none" if value is None else f"`{value if isinstance(value, str) else json.dumps(value)}`"


def values(node: dict[str, Any], schema: dict[str, Any]) -> str:
    """The type of a setting, or its values, and its range."""
    node = schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
    if "anyOf" in node:
        return " or ".join(values(option, schema) for option in node["anyOf"] if option != {"type": "null"})
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    kind = {"string": "text", "boolean": "true, false", "array": "list", "object": "mapping"}.get(node["type"])
    if kind is None:
        low = next((f"{word} {node[key]:g}" for key, word in LOW.items() if key in node), "")
        high = next((f"{word} {node[key]:,g}" for key, word in HIGH.items() if key in node), "")
        kind = f"{'integer' if node['type'] == 'integer' else 'number'} {' '.join((low, high)).strip()}".strip()
    return {"path": "path", "file-path": "path"}.get(node.get("format", ""), kind)


LOW = {"minimum": "from", "exclusiveMinimum": "above"}
HIGH = {"maximum": "to", "exclusiveMaximum": "below"}


def field_texts(kind: type) -> dict[str, str]:
    """Attribute -> the docstring below it."""
    (node,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(node, ast.ClassDef)
    result = {}
    for before, after in zip(node.body, node.body[1:], strict=False):
        if isinstance(before, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            result[ast.unparse(before.target)] = inspect.cleandoc(str(after.value.value))
    return result


# --- command line -----------------------------------------------------------------------------------------------------


def parsers() -> Iterator[tuple[str, ArgumentParser]]:
    """(the command as it is typed, its parser)."""
    for name, module in commands().items():
        parser = Parser(prog=f"hemostat {name}", description=module.HELP, allow_abbrev=False)
        module.add_arguments(parser)
        yield f"hemostat {name}", parser
        for action in parser._actions:
            if isinstance(action.choices, dict):  # commands of the command
                yield from ((f"hemostat {name} {part}", inner) for part, inner in action.choices.items())


def command_line() -> str:
    columns, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), "110"
    try:
        helps = [f"## {name}\n\n```text\n{parser.format_help()}```\n" for name, parser in parsers()]
    finally:
        os.environ.pop("COLUMNS") if columns is None else os.environ.update(COLUMNS=columns)
    return "# Command line\n\nMade by `make docs` from the program.\n\n" + "\n".join(helps)


# --- HTTP API ---------------------------------------------------------------------------------------------------------

TOKENS = {
    Access.OPEN: "",
    Access.METRICS: "with `admin.metrics_need_token`",
    Access.ADMIN: "admin",
    Access.ENGINE: "engine",
}
SUPPORT = {
    Support.SCORED: "can be sampled, scored and calibrated; outcomes are counted",
    Support.NOT_SCORED: "relayed; a sampled request is counted as skipped (`route`)",
    Support.RELAYED: "relayed, never sampled",
}
HTTP = """# HTTP API

Made by `make docs` from the routes of the code.

## Data port

What vLLM serves, at the same paths; any other path is relayed, too, and has the label `other` in metrics. Requests that
load or unload adapters are refused ([why](../operations.md#adapters-of-clients)). Headers of Hemostat's that a client
may send: [what a client notices](../quickstart.md#what-a-client-notices).

"""
ADMIN = """
## Admin port

Bodies and answers are JSON, where nothing else is said. Tokens are sent as `Authorization: Bearer TOKEN`. A change is
answered with 200 once it is in the store. 507: it applies, but is not stored yet, and a restart before that undoes it.
503 "not active": another control process owns the store, or this one has not read it yet.

"""


def admin_routes() -> dict[tuple[str, str], str]:
    """(method, path) -> the text of the route."""
    nothing: Any = SimpleNamespace(engines=SimpleNamespace(reports=None), profiles=SimpleNamespace(profile_bytes=None))
    routes = create_app(nothing, Tokens(), lambda: 0.0).routes
    return {
        (method, route.path): inspect.getdoc(route.endpoint) or ""
        for route in routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }


def http() -> str:
    served = table("path", "", rows=[(f"`{route.path}`", SUPPORT[route.support]) for route in ROUTES])
    texts = admin_routes()
    rows = [(f"`{method} {path}`", TOKENS[access], texts[method, path]) for (method, path), access in ACCESS.items()]
    return HTTP + served + ADMIN + table("route", "token", "", rows=rows)


# --- alerts -----------------------------------------------------------------------------------------------------------


def alerts() -> str:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    parts = [
        "# Alerts\n\nMade by `make docs` from [the rules](../../helm/hemostat/rules/hemostat.yaml). What to do: [the "
        "runbook](../runbook.md), a section for each.\n"
    ]
    rules = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    for rule in rules:
        name, notes = rule["alert"], rule["annotations"]
        waits = f", after {rule['for']}" if "for" in rule else ""
        parts.append(
            f"## {name}\n\n*{rule['labels']['severity']}{waits}* · [what to do](../runbook.md#{name.lower()})\n\n"
            f"{readable(notes['summary'])}. {notes['description']}\n\n```promql\n{rule['expr'].strip()}\n```\n"
        )
    return "\n".join(parts)


def readable(summary: str) -> str:
    """Returns the summary of an alert with plain names in place of Prometheus' templates.

    >>> readable("The store of {{ $labels.instance }} refuses, in {{ $value | humanizePercentage }}")
    'The store of INSTANCE refuses, in VALUE'
    """
    return re.sub(r"\{\{ \$(?:labels\.)?(\w+)[^}]*\}\}", lambda match: match[1].upper(), summary)


# --- errors -----------------------------------------------------------------------------------------------------------

ERRORS = """# Errors

Made by `make docs` from the code. vLLM's own errors are passed on as they are.

## Data port: answers of Hemostat's own

In OpenAI's form, `{"error": {"message", "type", "param", "code"}}`; … is a value. 502 and 503 have `Retry-After`.

"""
EXIT_CODES = {
    0: "done",
    2: "an error that you can correct, in one line on standard error: `hemostat: …`",
    EXIT_CODE_SUPERSEDED: "of a control process: another one has written to the store; its supervisor starts it again",
    EXIT_INTERRUPTED: "interrupted (Ctrl-C)",
}
RELAY = {
    "BadRequest": (),
    "error_body": (),
    "_overloaded": (503, "overloaded"),
    "give_way": (503, "overloaded"),
    "response_failed": (502, "upstream_failed"),
    "_refuse": (400, ""),
}
"""Function that makes an error -> status and code, where they are no arguments of it."""


def calls(*folders: str) -> Iterator[tuple[str, list[Any]]]:
    """(name of a function that is called, its arguments: constants, texts with … for a value, or None)."""
    files = [path for folder in folders for path in sorted((ROOT / "middleware" / "hemostat" / folder).rglob("*.py"))]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    imported = {name: text for tree in trees for name, text in constants(tree.body)}
    for tree in trees:
        texts = imported | dict(constants(ast.walk(tree)))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                yield name, [constant(argument, texts) for argument in node.args]


def constants(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, Any]]:
    """Names that are assigned a constant or an f-string."""
    for node in nodes:
        match node:
            case ast.Assign(targets=[ast.Name(name)], value=value) | ast.AnnAssign(ast.Name(name), value=value):
                if value is not None:
                    yield name, constant(value, {})


def constant(node: ast.expr, texts: dict[str, Any]) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return texts.get(node.id)
        case ast.JoinedStr():
            return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return None


def relay_errors() -> set[tuple[int, str, str]]:
    """(status, code, message) of what a relay itself answers."""
    result = set()
    for name, arguments in calls("relay", "interception", "openai"):
        if RELAY.get(name):
            status, code = RELAY[name]
            result.add((status, code, " ".join(part for part in arguments if part)))
        elif name in RELAY and len(arguments) > 1:
            status, message, *code = arguments
            result.add((status, code[0] if code else "", message))
    return {(s, c or "", m) for s, c, m in result if isinstance(s, int) and m}


def admin_errors() -> set[tuple[int, str]]:
    """(status, message) of what the admin port answers to a request that it refuses."""
    result = [arguments[-2:] for name, arguments in calls("admin", "engines") if name in ("HTTPException", "_refuse")]
    return {(status, message) for status, message in result if isinstance(message, str)}


def errors() -> str:
    relay = [(str(status), f"`{code}`" if code else "", message) for status, code, message in sorted(relay_errors())]
    admin = [(str(status), message) for status, message in sorted(admin_errors())]
    exits = [(str(code), text) for code, text in EXIT_CODES.items()]
    return (
        f"{ERRORS}{table('status', 'code', 'message', rows=relay)}\n## Admin port\n\nAs `detail`.\n\n"
        f"{table('status', 'detail', rows=admin)}\n## Exit codes of `hemostat`\n\n{table('code', '', rows=exits)}"
    )


PAGES: dict[str, Callable[[], str]] = {
    "settings.md": settings,
    "command-line.md": command_line,
    "http-api.md": http,
    "metrics.md": metrics.page,
    "alerts.md": alerts,
    "errors.md": errors,
}

if __name__ == "__main__":
    write(FOLDER)
