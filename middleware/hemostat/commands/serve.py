"""`hemostat serve`: run the proxy. Without a file, two models are enough; both are checked first."""

from __future__ import annotations

import argparse

from hemostat.commands.arguments import add_settings, load_settings

HELP = "Run the proxy: relays and their control process."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from hemostat.supervisor.serve import main  # noqa: PLC0415

    if options.config is None and options.reference is not None:
        from hemostat.commands.first_start import introduce, settings_with_tokens  # noqa: PLC0415

        print(introduce(*settings_with_tokens(options, keep=True)), flush=True)  # noqa: T201
    return main(lambda: load_settings(options))
