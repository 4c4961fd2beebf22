"""The command line. A command imports what it needs only when it runs, so that `--help` is quick and needs no torch."""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from types import ModuleType

from hemostat import __version__
from hemostat.commands import canaries, check, control, engines, gate, init, profile, relay, report, score, serve
from hemostat.commands.arguments import EXIT_INTERRUPTED, Parser, UsageError
from hemostat.config.packages import install_command
from hemostat_calibration.errors import HemostatError

GROUP = "hemostat.commands"
"""The entry points of other distributions: the name of a command, and a module with `HELP` and `add_arguments`."""
BUILT_IN = {
    "serve": serve,
    "relay": relay,
    "control": control,
    "init": init,
    "check": check,
    "profile": profile,
    "engines": engines,
    "canaries": canaries,
    "gate": gate,
    "score": score,
    "report": report,
}
LABORATORY = ("demo", "doctor", "compress", "adapt")
"""The commands that the distribution `hemostat-lab` adds."""


def commands() -> dict[str, ModuleType]:
    """Returns the module of every installed command by its name. A distribution that is damaged adds none."""
    added: dict[str, ModuleType] = {}
    for entry in importlib.metadata.entry_points(group=GROUP):
        with contextlib.suppress(ImportError, AttributeError):
            added[entry.name] = entry.load()
    known = {name: added.pop(name) for name in LABORATORY if name in added}
    return BUILT_IN | known | added


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code, 2 for an error that the user can correct (one line on stderr)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        options = _parser(arguments).parse_args(arguments)
        command: Callable[[Namespace], int] = options.command
        return command(options)
    except HemostatError as error:
        print(f"hemostat: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
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
    named = next((a for a in arguments if not a.startswith("-")), None)
    # A command that serves does not depend on how another distribution is installed.
    available = BUILT_IN if named in BUILT_IN else commands()
    if named is None and not {"-h", "--help", "--version"} & set(arguments):
        raise UsageError(f"a command is needed: {', '.join(available)} (see hemostat --help)")
    if named is not None and named not in available:
        raise UsageError(_unknown(named, list(available)))
    parsers = parser.add_subparsers(metavar="COMMAND")
    for name, module in available.items():
        module.add_arguments(parsers.add_parser(name, help=module.HELP, allow_abbrev=False))
    return parser


def _unknown(named: str, available: list[str]) -> str:
    if named in LABORATORY:
        advice = install_command("lab", ["hemostat-lab"])
        return f"{named} is a command of the laboratory, which is not installed, or damaged; {advice}"
    near = difflib.get_close_matches(named, [*available, *LABORATORY], 1)
    hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(available)}"
    shown = f"unknown command {named!r}" if named.isalnum() else "unknown command"
    return f"{shown}; {hint}"
