"""`hemostat control`: run a control process without relays of its own. Without a file, two models are enough, as for
`hemostat serve`: the plugin in vLLM then measures alone."""

from __future__ import annotations

import argparse

from hemostat.commands.arguments import add_settings, load_settings

HELP = "Run a control process: its relays are on other machines, or the plugin in vLLM measures alone."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from hemostat.supervisor.role import Role  # noqa: PLC0415
    from hemostat.supervisor.serve import main  # noqa: PLC0415

    if options.config is None and options.reference is not None and load_settings(options).control.listen is None:
        from hemostat.commands.first_start import introduce, settings_with_tokens  # noqa: PLC0415

        print(introduce(*settings_with_tokens(options, keep=True), alone=True), flush=True)  # noqa: T201
    return main(lambda: load_settings(options), Role.CONTROL)
