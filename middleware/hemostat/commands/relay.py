"""`hemostat relay`: run relays whose control process is on another machine."""

from __future__ import annotations

import argparse

from hemostat.commands.arguments import add_settings, load_settings

HELP = "Run relays whose control process is on another machine."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from hemostat.supervisor.role import Role  # noqa: PLC0415
    from hemostat.supervisor.serve import main  # noqa: PLC0415

    return main(lambda: load_settings(options), Role.RELAY)
