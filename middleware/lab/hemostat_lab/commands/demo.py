"""`hemostat demo`: real models and real prompts on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from hemostat.commands.arguments import positive_integer
from hemostat_lab.commands.arguments import COMPRESSIONS

HELP = "Show Hemostat with real models and real prompts on this machine."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--requests",
        type=positive_integer,
        metavar="N",
        help="End after N requests (default: 60 to 240 requests after a promotion, when the figures have intervals).",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE.jsonl",
        help='A file with prompts, one {"messages": [...], "max_tokens": n} per line.',
    )
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="Write the figures to this file at the end.")
    parser.add_argument(
        "--html",
        type=Path,
        default=Path("report.html"),
        metavar="FILE.html",
        help="Write the result as a page to this file at the end (default: report.html).",
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="Keep the checkpoints and every scored request in this folder."
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="Seed of the random numbers (default: 0).")
    parser.add_argument(
        "--compression",
        choices=COMPRESSIONS,
        default=COMPRESSIONS[0],
        help=f"How the model is compressed (default: {COMPRESSIONS[0]}).",
    )
    parser.add_argument("--no-console", action="store_true", help="Print plain lines instead of the live view.")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="Set a key of the configuration, as for serve: --set calibration.clamp_nats=1.",
    )
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from hemostat_lab.demo.options import DemoOptions  # noqa: PLC0415
    from hemostat_lab.demo.runner import run  # noqa: PLC0415

    return run(
        DemoOptions(
            requests=options.requests,
            prompts=options.prompts,
            report=options.report,
            html=options.html,
            keep=options.keep,
            seed=options.seed,
            compression=options.compression,
            console=not options.no_console,
            overrides=tuple(options.set),
        )
    )
