"""`make docs`: writes the console's runbook.html from docs/runbook.md. The alerts' runbook_url opens it.

The admin port serves it, so that it needs no network and matches the running version.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "docs" / "runbook.md"
PAGE = ROOT / "middleware" / "hemostat" / "admin" / "console" / "runbook.html"

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Runbook – Hemostat</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="console/console.css">
</head>
<body>
<!-- Generated from docs/runbook.md by `make docs`; do not edit. -->
<nav class="back"><a href=".">Back to the console</a></nav>
<main class="text">
{body}</main>
</body>
</html>
"""


def page() -> str:
    """The page. Links to files of the repository become text, because the admin port does not serve them."""
    parser = MarkdownIt("commonmark", {"html": False})
    tokens = parser.parse(SOURCE.read_text(encoding="utf-8"))
    for heading, inline in itertools.pairwise(tokens):
        if heading.type == "heading_open":
            heading.attrSet("id", re.sub(r"[^\w\- ]", "", inline.content.lower()).replace(" ", "-"))
    for token in tokens:
        token.children = list(without_files(token.children)) if token.children else token.children
    body: str = parser.renderer.render(tokens, parser.options, {})
    return TEMPLATE.format(body=body)


def without_files(tokens: list[Token]) -> list[Token]:
    """The inline tokens, without links to files; links within the page and to web sites are kept."""
    kept: list[Token] = []
    dropped: list[bool] = []
    for token in tokens:
        if token.type == "link_open":
            dropped.append(re.match(r"#|https://", str(token.attrGet("href"))) is None)
        closes = token.type == "link_close"
        if not (dropped and dropped[-1] and (token.type == "link_open" or closes)):
            kept.append(token)
        if closes:
            dropped.pop()
    return kept


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
