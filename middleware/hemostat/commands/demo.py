"""`hemostat demo`: real models and real prompts on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from hemostat.commands.arguments import COMPRESSIONS, positive_integer

HELP = "real models, real prompts, on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--requests", type=positive_integer, metavar="N", help="end after N requests (default: until Ctrl-C)"
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE.jsonl", help='one {"messages": [...], "max_tokens": n} per line'
    )
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="write the figures to this file at the end")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep the checkpoints and every scored request in this folder"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of random numbers (0)")
    parser.add_argument(
        "--compression", choices=COMPRESSIONS, default=COMPRESSIONS[0], help=f"of the model ({COMPRESSIONS[0]})"
    )
    parser.add_argument("--no-console", action="store_true", help="print plain lines instead of the live view")
    parser.add_argument("--force-profile", type=Path, metavar="FILE", help="apply this profile to every request")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="as for serve: --set calibration.clamp_nats=1"
    )
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from hemostat.demo.options import DemoOptions  # noqa: PLC0415
    from hemostat.demo.runner import run  # noqa: PLC0415

    return run(
        DemoOptions(
            requests=options.requests,
            prompts=options.prompts,
            report=options.report,
            keep=options.keep,
            seed=options.seed,
            compression=options.compression,
            console=not options.no_console,
            force_profile=options.force_profile,
            overrides=tuple(options.set),
        )
    )
