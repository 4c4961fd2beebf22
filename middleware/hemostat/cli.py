"""The command line. A command imports what it needs only when it runs, so that `--help` is quick and needs no torch."""

from __future__ import annotations

import difflib
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence

from hemostat import __version__
from hemostat.commands import (
    adapt,
    canaries,
    check,
    compress,
    control,
    demo,
    doctor,
    engines,
    init,
    profile,
    relay,
    serve,
)
from hemostat.commands.arguments import Parser, UsageError
from hemostat_calibration.errors import HemostatError

COMMANDS = {
    "serve": serve,
    "relay": relay,
    "control": control,
    "demo": demo,
    "init": init,
    "check": check,
    "compress": compress,
    "adapt": adapt,
    "doctor": doctor,
    "profile": profile,
    "engines": engines,
    "canaries": canaries,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code, 2 for an error that the user can correct (one line on stderr)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        options = _parser(arguments).parse_args(arguments)
        command: Callable[[Namespace], int] = options.command
        return command(options)
    except HemostatError as error:
        print(f"hemostat: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of standard output has ended (`| head`); without this, Python would complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser(arguments: Sequence[str]) -> ArgumentParser:
    parser = Parser(
        prog="hemostat",
        description="Measures live what compression costs a language model served by vLLM, and calibrates its "
        "decoding.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hemostat {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, module in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=module.HELP, allow_abbrev=False))
    named = next((a for a in arguments if not a.startswith("-")), None)
    if named is None and not {"-h", "--help", "--version"} & set(arguments):
        raise UsageError(f"a command is needed: {', '.join(COMMANDS)} (see hemostat --help)")
    if named is not None and named not in COMMANDS:
        near = difflib.get_close_matches(named, list(COMMANDS), 1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(COMMANDS)}"
        shown = f"unknown command {named!r}" if named.isalnum() else "unknown command"
        raise UsageError(f"{shown}; {hint}")
    return parser
