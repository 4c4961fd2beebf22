"""Arguments that several commands of the laboratory share."""

from __future__ import annotations

import argparse
from pathlib import Path

from hemostat.commands.arguments import positive_integer

WITHOUT_DATA = ("prune10", "prune30", "prune50")
COMPRESSIONS = ("w4a16", "w8a8", *WITHOUT_DATA)


def non_negative_integer(text: str) -> int:
    return 0 if text == "0" else positive_integer(text)


def add_overwrite(parser: argparse.ArgumentParser, destination: str) -> None:
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help=f"Replace a result of Hemostat in {destination}. Other files are never replaced.",
    )


def add_texts(parser: argparse.ArgumentParser, writer: str) -> None:
    """Add --prompts and --records: what a command calibrates on. writer: the checkpoint that completes prompts."""
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help=f'A file with one prompt per line: text, {{"prompt": "..."}} or {{"messages": [...]}}. If a line has no '
        f'"completion", {writer} writes one (default: prompts that come with Hemostat).',
    )
    texts.add_argument(
        "--records",
        type=Path,
        metavar="FILE",
        help="A file with texts that records.path has written. Nothing is generated.",
    )
