"""`hemostat check`: validate the configuration and probe both models."""

from __future__ import annotations

import argparse

from hemostat.commands.arguments import add_settings, load_settings

HELP = "Validate the configuration and probe both models."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    parser.add_argument(
        "--print-config", action="store_true", help="Print the effective configuration with masked secrets, and exit."
    )
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    settings = load_settings(options)
    if options.print_config:
        import yaml  # noqa: PLC0415

        print(yaml.safe_dump(settings.redacted(), sort_keys=False), end="")  # noqa: T201
        return 0
    import asyncio  # noqa: PLC0415

    from hemostat.commands.setup_check import check, exit_code, table  # noqa: PLC0415

    findings = asyncio.run(check(settings))
    print(table(findings))  # noqa: T201
    return exit_code(findings)
