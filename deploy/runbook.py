"""`make docs`: writes the console's runbook.html from deploy/RUNBOOK.md: where the alerts' runbook_url leads.

A page of the admin port, so that it needs no network and is of the version that runs.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from markdown_it import MarkdownIt  # rich brings it
from markdown_it.token import Token

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "RUNBOOK.md"
PAGE = FOLDER.parent / "middleware" / "hemostat" / "admin" / "console" / "runbook.html"

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
<!-- Made from deploy/RUNBOOK.md by `make docs`. -->
<nav class="back"><a href=".">To the console</a></nav>
<main class="text">
{body}</main>
</body>
</html>
"""


def page() -> str:
    """The page. What links to other files of the repository is text here: they are not served."""
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
    """Inline tokens, with those links only that lead into the page or to a site."""
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
