"""`hemostat profile …`: look at and control calibration profiles, through the admin port."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hemostat.commands.admin_port import add_admin_options, admin_json, admin_request
from hemostat.commands.arguments import UsageError

HELP = "Show and control calibration profiles."
MODES = ("off", "observe", "auto")
WHOLE_VERSION = 32
"""The number of hex digits of a version; 8 or more of them are enough to name it."""
VERSION_HELP = "Version of a profile. Its first 8 digits are enough."
PROFILE_MARKER = b'"clamp_nats"'
"""The bytes that stand in the header of every profile's file."""
PEFT_TENSOR = b".lora_A.weight"
"""The part of the names of a PEFT adapter's tensors."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    def action(name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        child = actions.add_parser(name, help=text, allow_abbrev=False)
        add_admin_options(child)
        child.set_defaults(command=run)
        return child

    action("list", "Show all profiles.", _profile_list)
    action("show", "Show one profile.", _profile_show).add_argument("version", metavar="VERSION", help=VERSION_HELP)
    export = action("export", "Write a profile to a file.", _profile_export)
    export.add_argument("version", metavar="VERSION", help=VERSION_HELP)
    export.add_argument("file", type=Path, metavar="FILE", help="File to write.")
    imported = action("import", "Import a profile from a file as a candidate.", _profile_import)
    imported.add_argument(
        "file", type=Path, metavar="FILE", help="The profile.safetensors that export or hemostat adapt has written."
    )
    promote = action(
        "promote", "Serve a profile without statistical proof. It is monitored like any other.", _profile_promote
    )
    promote.add_argument("version", metavar="VERSION", help=VERSION_HELP)
    promote.add_argument("--yes", action="store_true", help="Do not ask for confirmation.")
    pin = action("pin", "Serve a profile, whatever the evidence, until --off.", _profile_pin)
    which = pin.add_mutually_exclusive_group(required=True)
    which.add_argument("version", metavar="VERSION", nargs="?", help=VERSION_HELP)
    which.add_argument(
        "--off", action="store_true", help="Unpin the profile: it continues to serve, and is judged again."
    )
    pin.add_argument("--yes", action="store_true", help="Do not ask for confirmation.")
    rollback = action("rollback", "Serve no profile until another one is promoted.", _profile_rollback)
    release = action(
        "release",
        "Let profiles serve again in kinds that serve identity because an outcome was harmed.",
        _profile_release,
    )
    for child in (promote, pin, rollback, release):
        child.add_argument(
            "--kind", metavar="KIND", help="Only this kind of traffic (default: all). list shows the kinds."
        )
    action("mode", "Set calibration.mode.", _profile_mode).add_argument("mode", choices=MODES)


def _profile_list(options: argparse.Namespace) -> int:
    _print_json(admin_json(options, "GET", "/api/v1/profiles"))
    return 0


def _profile_show(options: argparse.Namespace) -> int:
    _print_json(admin_json(options, "GET", f"/api/v1/profiles/{_version(options.version)}"))
    return 0


def _profile_export(options: argparse.Namespace) -> int:
    from hemostat.report.written_files import other_content  # noqa: PLC0415
    from hemostat_calibration.profiles.profile import CalibrationProfile  # noqa: PLC0415

    version = _version(options.version)
    if refused := other_content(options.file, PROFILE_MARKER):
        raise UsageError(refused)
    if len(version) < WHOLE_VERSION:  # the bytes are checked against the whole one
        version = admin_json(options, "GET", f"/api/v1/profiles/{version}")["version"]
    data = admin_request(options, "GET", f"/api/v1/engine/profiles/{version}").content
    CalibrationProfile.from_bytes(data, version)
    try:
        options.file.write_bytes(data)
    except OSError as error:
        raise UsageError(f"{options.file}: cannot be written ({error.strerror})") from None
    print(f"{options.file}: {len(data)} bytes")  # noqa: T201
    return 0


def _profile_import(options: argparse.Namespace) -> int:
    from hemostat_calibration.profiles.profile import CalibrationProfile  # noqa: PLC0415

    data = _read_profile(options.file)
    CalibrationProfile.from_bytes(data)  # an invalid file is refused before it is sent
    answer = admin_request(options, "POST", "/api/v1/profiles", content=data)
    print(answer.json()["version"])  # noqa: T201
    return 0


def _read_profile(file: Path) -> bytes:
    """Returns the bytes of a profile's file. Raises UsageError if it cannot be read, or is an adapter in PEFT's format,
    which is no profile."""
    from hemostat_calibration.profiles.peft import CONFIG_FILE, WEIGHTS_FILE  # noqa: PLC0415

    names = (CONFIG_FILE, WEIGHTS_FILE)
    where = "a profile is one file: give the profile.safetensors of the folder that hemostat adapt wrote ({})"
    if file.is_dir():
        what = "is a PEFT folder" if any((file / name).exists() for name in names) else "is a folder"
        raise UsageError(f"{file}: {what}; {where.format(file / 'profile.safetensors')}")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror})") from None
    length = int.from_bytes(data[:8], "little")  # of a safetensors file's header
    if file.name in names or PEFT_TENSOR in data[8 : 8 + length]:
        raise UsageError(f"{file}: is a part of a PEFT adapter; {where.format(file.with_name('profile.safetensors'))}")
    return data


def _profile_promote(options: argparse.Namespace) -> int:
    version = _version(options.version)
    _confirm(options, f"Serve {version} {_to_kind(options)} without statistical proof?")
    return _post(options, "promote", {"version": version, "kind": options.kind})


def _profile_pin(options: argparse.Namespace) -> int:
    version = None if options.off else _version(options.version)
    if version is not None:
        _confirm(options, f"Serve {version} {_to_kind(options)}, whatever the evidence, until it is unpinned?")
    return _post(options, "pin", {"version": version, "kind": options.kind})


def _profile_rollback(options: argparse.Namespace) -> int:
    return _post(options, "rollback", {"kind": options.kind})


def _profile_release(options: argparse.Namespace) -> int:
    return _post(options, "release", {"kind": options.kind})


def _to_kind(options: argparse.Namespace) -> str:
    return f"to {options.kind!r}" if options.kind else "to all requests"


def _post(options: argparse.Namespace, action: str, body: dict[str, Any]) -> int:
    _print_json(admin_json(options, "POST", f"/api/v1/profiles/{action}", json=body))
    return 0


def _confirm(options: argparse.Namespace, question: str) -> None:
    """Raises UsageError unless the user confirms, or --yes is given."""
    if options.yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("standard input is not a terminal, so it cannot be confirmed: give --yes")
    if input(f"{question} [y/N] ").strip().lower() not in {"y", "yes"}:
        raise UsageError("nothing was changed")


def _profile_mode(options: argparse.Namespace) -> int:
    _print_json(admin_json(options, "POST", "/api/v1/calibration", json={"mode": options.mode}))
    return 0


def _version(text: str) -> str:
    """Checks that the text is a version, or the first digits of one, and returns it: Hemostat knows which it is."""
    if not re.fullmatch(r"[0-9a-f]{8,32}", text):
        raise UsageError(
            f"{text!r} is not a profile version (8 to 32 lowercase hex digits); hemostat profile list shows them"
        )
    return text


def _print_json(value: Any) -> None:
    import json  # noqa: PLC0415

    print(json.dumps(value, indent=2, ensure_ascii=False))  # noqa: T201
