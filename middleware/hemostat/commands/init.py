"""`hemostat init`: write a configuration file."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from hemostat.commands.arguments import UsageError, add_settings

HELP = "Write a commented hemostat.yaml for two models."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        nargs="?",
        type=Path,
        default=Path("hemostat.yaml"),
        metavar="FILE",
        help="The file to write (default: hemostat.yaml).",
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace the file if it exists.")
    add_settings(parser, file=False)
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    from hemostat.commands.first_start import plugin_command, settings_with_tokens  # noqa: PLC0415
    from hemostat.config.rendering import render  # noqa: PLC0415
    from hemostat.config.text import one_line  # noqa: PLC0415

    path: Path = options.file
    settings, made = settings_with_tokens(options)
    text = render(settings, str(path)).encode()
    name = one_line(str(path))
    # An earlier file stays until this one is complete.
    written = path.with_name(f".{path.name}-{os.getpid()}") if options.overwrite else path
    try:
        # It has tokens: readable by its owner only.
        with open(os.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            try:
                file.write(text)
                file.flush()
                if options.overwrite:
                    written.replace(path)
            except OSError:
                written.unlink()
                raise
    except FileExistsError:
        raise UsageError(f"{path} exists: give another name, or --overwrite") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})") from None
    print(plugin_command(settings, made))  # noqa: T201
    print(f"{name} is written; next: hemostat serve --config {shlex.quote(name)}")  # noqa: T201
    return 0
