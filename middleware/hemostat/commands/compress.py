"""`hemostat compress`: quantize or prune a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from hemostat.commands.arguments import COMPRESSIONS

HELP = "quantize or prune a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder of a transformers checkpoint")
    parser.add_argument("destination", type=Path, metavar="DEST", help="folder to write")
    parser.add_argument("--scheme", choices=COMPRESSIONS, required=True)
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from hemostat.models.compression.compress import compress  # noqa: PLC0415

    compress(options.source, options.destination, options.scheme, print)
    return 0
