"""`hemostat report`: the figures of captures that `hemostat score` has scored."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from hemostat import __version__
from hemostat.commands.arguments import UsageError
from hemostat.config.packages import install_command, require

if TYPE_CHECKING:
    from hemostat.scoring.spool.segments import Location

HELP = "Report the figures of captures that hemostat score has scored."
KEY_HELP = (
    "The key of the folders, as in spool.key: the path of a file, env:NAME, or plain if nothing is encrypted (default: "
    "plain)."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        help="The folder that hemostat score has written, or its address in an object store.",
    )
    parser.add_argument("--key", default="plain", metavar="KEY", help=KEY_HELP)
    add_outputs(parser)
    parser.set_defaults(command=_run)


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say what is reported."""
    parser.add_argument(
        "--cycle-hours",
        type=float,
        default=24.0,
        metavar="H",
        help="The cycle of the traffic, as in evidence.cycle_hours (default: 24).",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write the report as JSON.")
    parser.add_argument("--html", type=Path, metavar="FILE", help="Write the report as a page (extra `report`).")


def check_outputs(options: argparse.Namespace) -> None:
    """Raises UsageError if the report could not be written."""
    from hemostat.report.written_files import other_content  # noqa: PLC0415
    from hemostat.scoring.offline.summary import MARKER  # noqa: PLC0415

    if not 0.0 <= options.cycle_hours <= 24.0 * 14:
        raise UsageError("--cycle-hours: give 0 to 336 hours")
    for path, marker in ((options.json, b'"report": "hemostat report"'), (options.html, MARKER)):
        if path is not None and (why := other_content(path, marker)):
            raise UsageError(why)
        if path is not None and not os.access(path.parent, os.W_OK):
            raise UsageError(f"{path} cannot be written: its folder does not exist or is read-only; name another file")


def unreachable(folder: Location, error: OSError) -> str:
    """Returns the message for a folder, or an object store, of which nothing can be known."""
    return f"{folder} cannot be looked at ({error.strerror or str(error)[:200]}); check its address and its credentials"


def write_report(folder: Location, options: argparse.Namespace) -> None:
    """Prints the report of a folder, and writes it where the options say."""
    from hemostat.report.written_files import write_atomically  # noqa: PLC0415
    from hemostat.scoring.offline.evidence import read_evidence  # noqa: PLC0415
    from hemostat.scoring.offline.summary import lines, page  # noqa: PLC0415
    from hemostat.scoring.spool.keys import read_key  # noqa: PLC0415

    try:
        report = asyncio.run(read_evidence(folder, read_key(options.key), options.cycle_hours))
    except OSError as error:
        raise UsageError(f"{folder} cannot be read ({error.strerror or error}); name another folder") from None
    for line in lines(report):
        print(line)  # noqa: T201
    try:
        if options.json is not None:
            write_atomically(options.json, json.dumps(report, indent=2).encode() + b"\n")
        if options.html is not None:
            write_atomically(options.html, page(report, __version__).encode())
    except OSError as error:
        raise UsageError(f"the report cannot be written ({error.strerror}); name another file") from None
    except ModuleNotFoundError as error:
        raise UsageError(f"--html needs {error.name}; {install_command('report')}, or leave --html out") from None


def _run(options: argparse.Namespace) -> int:
    require("spool")
    from hemostat.scoring.spool.objects import location  # noqa: PLC0415  an extra

    options.folder = location(options.folder)
    try:
        there = options.folder.is_dir()
    except OSError as error:
        raise UsageError(unreachable(options.folder, error)) from None
    if not there:
        raise UsageError(f"there is no folder {options.folder}; name the one that hemostat score has written")
    check_outputs(options)
    write_report(options.folder, options)
    return 0
