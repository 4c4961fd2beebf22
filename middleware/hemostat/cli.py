"""The command line. Every command imports what it needs when it runs, so that `--help` is quick and needs no torch."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hemostat import __version__
from hemostat_calibration.errors import HemostatError

if TYPE_CHECKING:
    import httpx

    from hemostat.config.schema import Settings

DEFAULT_ADMIN = "http://127.0.0.1:8081"
ADMIN_WITHIN = 30.0
COMPRESSIONS = ("w4a16", "int3", "w8a8", "prune10", "prune30", "prune50")
MODES = ("off", "observe", "auto")

SHORTHANDS = {
    "upstream": ("upstream.url", "URL", "the vLLM server with the compressed model"),
    "host": ("listen.host", "HOST", "data port's address"),
    "port": ("listen.port", "PORT", "data port"),
    "admin-port": ("admin.port", "PORT", "admin port"),
    "rate": ("shadow.rate", "FRACTION", "part of the requests that is measured"),
    "mode": ("calibration.mode", "MODE", "off, observe or auto"),
    "workers": ("workers", "N", "relay processes"),
    "log-level": ("log.level", "LEVEL", "debug, info, warning or error"),
}
"""Flag -> dotted key, placeholder, help."""


class UsageError(HemostatError):
    """The command line cannot be meant; one line."""


class _Parser(argparse.ArgumentParser):
    """Errors are one line, and name the nearest command."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 2 for what the user has to put right, said in one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        options = _parser(arguments).parse_args(arguments)
        command: Callable[[argparse.Namespace], int] = options.command
        return command(options)
    except HemostatError as error:
        print(f"hemostat: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read us has gone (`| head`); keep Python from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hemostat",
        description="Measures live what compression costs a language model served by vLLM; calibrates its decoding.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hemostat {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the proxy", allow_abbrev=False)
    _add_settings(serve)
    serve.set_defaults(command=_serve)

    demo = commands.add_parser("demo", help="real models, real prompts, on this machine", allow_abbrev=False)
    demo.add_argument("--requests", type=_positive, metavar="N", help="end after N requests (default: until Ctrl-C)")
    demo.add_argument("--prompts", type=Path, metavar="FILE.jsonl", help='{"messages": [...], "max_tokens": n} a line')
    demo.add_argument("--report", type=Path, metavar="FILE.json", help="write the figures there at the end")
    demo.add_argument("--keep", type=Path, metavar="DIR", help="leave the checkpoints and every scored request there")
    demo.add_argument("--seed", type=int, default=0, metavar="S")
    demo.add_argument("--compression", choices=COMPRESSIONS, default=COMPRESSIONS[0])
    demo.add_argument("--no-console", action="store_true", help="plain lines in place of the live picture")
    demo.add_argument("--force-profile", type=Path, metavar="FILE", help="put this profile on every request")
    demo.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="as of serve: --set calibration.clamp_nats=1"
    )
    demo.set_defaults(command=_demo)

    check = commands.add_parser(
        "check", help="validate the configuration and ask both models what will work", allow_abbrev=False
    )
    _add_settings(check)
    check.add_argument("--print-config", action="store_true", help="print what is in force, secrets starred, and end")
    check.set_defaults(command=_check)

    compress = commands.add_parser("compress", help="quantize or prune a checkpoint", allow_abbrev=False)
    compress.add_argument("source", type=Path, metavar="SOURCE", help="folder of a transformers checkpoint")
    compress.add_argument("destination", type=Path, metavar="DEST", help="folder to write")
    compress.add_argument("--scheme", choices=COMPRESSIONS, required=True)
    compress.set_defaults(command=_compress)

    _add_doctor(commands.add_parser("doctor", help="an offline report on two models", allow_abbrev=False))
    _add_profile(commands.add_parser("profile", help="look at and steer calibration profiles", allow_abbrev=False))

    named = next((a for a in arguments if not a.startswith("-")), None)
    if named is None and not {"-h", "--help", "--version"} & set(arguments):
        raise UsageError(f"a command is needed: {', '.join(commands.choices)} (see hemostat --help)")
    if named is not None and named not in commands.choices:
        near = difflib.get_close_matches(named, list(commands.choices), 1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(commands.choices)}"
        raise UsageError(f"unknown command {named!r}; {hint}")
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file (without: environment and flags only)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any key, as in --set shadow.rate=0.1"
    )
    for flag, (key, placeholder, text) in SHORTHANDS.items():
        parser.add_argument(f"--{flag}", dest=key, metavar=placeholder, help=f"{text} ({key})")


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    kinds = "checkpoint folder or hub name, or URL[#NAME] of a vLLM server"
    parser.add_argument("reference", metavar="REFERENCE", help=f"the original: {kinds}")
    parser.add_argument("compressed", metavar="COMPRESSED", help="what was made from it, of the same kind")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='a prompt a line: text, {"prompt": "..."} or {"messages": [...]}, with a "completion" if it is not to be '
        "generated (default: those that Hemostat brings)",
    )
    parser.add_argument("--max-prompts", type=_positive, metavar="N", help="the first N only")
    parser.add_argument("--tokens", type=_positive, default=64, metavar="N", help="the most generated for one (64)")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    decoding = parser.add_mutually_exclusive_group()
    decoding.add_argument("--greedy", action="store_true", help="generate greedily (default: sample at temperature 1)")
    decoding.add_argument("--given", action="store_true", help="generate nothing: score the lines' own text")
    parser.add_argument("--batch", type=_positive, default=16, metavar="N", help="prompts generated for at once (16)")
    parser.add_argument("--device", default="auto", metavar="DEVICE", help="of torch (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--top-k", type=_positive, default=20, metavar="K", help="servers: ids asked a position (20)")
    parser.add_argument(
        "--layer-tokens", type=_natural, default=512, metavar="N", help="tokens for the layers (512; 0: leave them out)"
    )
    parser.add_argument("--worst", type=_positive, default=10, metavar="N", help="rows of the worst lists (10)")
    parser.add_argument("--show-text", action="store_true", help="show texts of the worst prompts and tokens")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep finished work there (default: until the report)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--html", type=Path, metavar="FILE")
    parser.set_defaults(command=_doctor)


def _add_profile(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    def action(name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        child = actions.add_parser(name, help=text, allow_abbrev=False)
        child.add_argument(
            "--admin",
            # The engine plugin's may name every replica's (`a,b`, `dns+http://name`); any of them will do.
            default=(os.environ.get("HEMOSTAT_ADMIN_URL") or DEFAULT_ADMIN).split(",")[0].removeprefix("dns+"),
            metavar="URL",
            help=f"admin port (HEMOSTAT_ADMIN_URL; default {DEFAULT_ADMIN})",
        )
        child.add_argument("--token", metavar="TOKEN", help="admin.token (better: HEMOSTAT_ADMIN_TOKEN)")
        child.set_defaults(command=run)
        return child

    action("list", "every profile", _profile_list)
    action("show", "one profile", _profile_show).add_argument("version", metavar="VERSION")
    export = action("export", "write one to a file", _profile_export)
    export.add_argument("version", metavar="VERSION")
    export.add_argument("file", type=Path, metavar="FILE")
    scope_of = "label, route or model whose requests it is for (calibration.scope)"
    imported = action("import", "put one from a file to the test", _profile_import)
    imported.add_argument("file", type=Path, metavar="FILE")
    imported.add_argument("--scope", metavar="NAME", default="", help=scope_of)
    promote = action(
        "promote", "let one serve without the guard's word; it is watched like any other", _profile_promote
    )
    promote.add_argument("version", metavar="VERSION")
    promote.add_argument("--scope", metavar="NAME", default="", help=scope_of)
    promote.add_argument("--yes", action="store_true", help="do not ask")
    pin = action("pin", "let one serve all requests, whatever the guard says, until --off", _profile_pin)
    which = pin.add_mutually_exclusive_group(required=True)
    which.add_argument("version", metavar="VERSION", nargs="?")
    which.add_argument("--off", action="store_true", help="unpin: what is pinned goes on serving, and is judged again")
    pin.add_argument("--yes", action="store_true", help="do not ask")
    rollback = action("rollback", "serve identity until another profile is promoted", _profile_rollback)
    rollback.add_argument("--scope", metavar="NAME", help="of this label, route or model alone")
    action("mode", "switch calibration", _profile_mode).add_argument("mode", choices=MODES)


def _settings(options: argparse.Namespace) -> Settings:
    from hemostat.config.loading import load  # noqa: PLC0415

    overrides = [(key, value) for key, _, _ in SHORTHANDS.values() if (value := getattr(options, key)) is not None]
    for text in options.set:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text}: write it as KEY=VALUE")
        overrides.append((key.strip(), value))
    return load(options.config, os.environ, overrides)


def _serve(options: argparse.Namespace) -> int:
    settings = _settings(options)
    from hemostat.supervisor import main as serve  # noqa: PLC0415

    return serve(settings)


def _check(options: argparse.Namespace) -> int:
    settings = _settings(options)
    if options.print_config:
        import yaml  # noqa: PLC0415

        print(yaml.safe_dump(settings.redacted(), sort_keys=False), end="")  # noqa: T201
        return 0
    import asyncio  # noqa: PLC0415

    from hemostat.commands.check import check, exit_code, table  # noqa: PLC0415

    findings = asyncio.run(check(settings))
    print(table(findings))  # noqa: T201
    return exit_code(findings)


def _demo(options: argparse.Namespace) -> int:
    from hemostat.demo import DemoOptions, run  # noqa: PLC0415

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


def _compress(options: argparse.Namespace) -> int:
    from hemostat.models.compress import compress  # noqa: PLC0415

    compress(options.source, options.destination, options.scheme, print)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from hemostat.doctor import DoctorOptions, run  # noqa: PLC0415

    named = {name: getattr(options, name) for name in DoctorOptions.__dataclass_fields__ if hasattr(options, name)}
    return run(DoctorOptions(**named, decoding="greedy" if options.greedy else "given" if options.given else "sampled"))


def _profile_list(options: argparse.Namespace) -> int:
    _print_json(_admin(options, "GET", "/api/v1/profiles").json())
    return 0


def _profile_show(options: argparse.Namespace) -> int:
    _print_json(_admin(options, "GET", f"/api/v1/profiles/{_version(options.version)}").json())
    return 0


def _profile_export(options: argparse.Namespace) -> int:
    from hemostat_calibration.profiles.profile import CalibrationProfile  # noqa: PLC0415

    version = _version(options.version)
    data = _admin(options, "GET", f"/api/v1/engine/profiles/{version}").content
    CalibrationProfile.from_bytes(data, version)
    try:
        options.file.write_bytes(data)
    except OSError as error:
        raise UsageError(f"{options.file}: cannot be written ({error.strerror})") from None
    print(f"{options.file}: {len(data)} bytes")  # noqa: T201
    return 0


def _profile_import(options: argparse.Namespace) -> int:
    from hemostat_calibration.profiles.profile import CalibrationProfile  # noqa: PLC0415

    try:
        data = options.file.read_bytes()
    except OSError as error:
        raise UsageError(f"{options.file}: cannot be read ({error.strerror})") from None
    CalibrationProfile.from_bytes(data)  # a file that is no profile is refused before it travels
    scope = {"params": {"scope": options.scope}} if options.scope else {}
    answer = _admin(options, "POST", "/api/v1/profiles", content=data, **scope)
    print(answer.json()["version"])  # noqa: T201
    return 0


def _profile_promote(options: argparse.Namespace) -> int:
    version = _version(options.version)
    _confirm(options, f"Let {version} serve before the guard has spoken for it?")
    body = {"version": version, "scope": options.scope}
    _print_json(_admin(options, "POST", "/api/v1/profiles/promote", json=body).json())
    return 0


def _profile_pin(options: argparse.Namespace) -> int:
    version = None if options.off else _version(options.version)
    if version is not None:
        _confirm(options, f"Let {version} serve all requests, whatever is measured, until it is unpinned?")
    _print_json(_admin(options, "POST", "/api/v1/profiles/pin", json={"version": version}).json())
    return 0


def _profile_rollback(options: argparse.Namespace) -> int:
    _print_json(_admin(options, "POST", "/api/v1/profiles/rollback", json={"scope": options.scope}).json())
    return 0


def _confirm(options: argparse.Namespace, question: str) -> None:
    """UsageError unless the user, or --yes, says so."""
    if options.yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("nobody is there to confirm it: give --yes")
    if input(f"{question} [y/N] ").strip().lower() not in {"y", "yes"}:
        raise UsageError("nothing was changed")


def _profile_mode(options: argparse.Namespace) -> int:
    _print_json(_admin(options, "POST", "/api/v1/calibration", json={"mode": options.mode}).json())
    return 0


def _admin(options: argparse.Namespace, method: str, path: str, **body: Any) -> httpx.Response:
    """One call of the admin port; UsageError when it cannot be reached or refuses."""
    import httpx  # noqa: PLC0415

    token = options.token or os.environ.get("HEMOSTAT_ADMIN_TOKEN")
    headers = {"authorization": f"Bearer {token}"} if token else {}
    try:
        with httpx.Client(base_url=options.admin, timeout=ADMIN_WITHIN, trust_env=False) as client:
            response = client.request(method, path, headers=headers, **body)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UsageError(
            f"{options.admin}: {error} (is hemostat serve running? --admin names its admin port)"
        ) from None
    if response.is_success:
        return response
    try:
        detail = response.json()["detail"]
    except (ValueError, LookupError, TypeError):
        detail = response.text[:300]
    raise UsageError(f"{options.admin}{path} answered {response.status_code}: {detail}")


def _version(text: str) -> str:
    from hemostat_calibration.profiles.profile import VERSION_PATTERN  # noqa: PLC0415

    if not VERSION_PATTERN.fullmatch(text):
        raise UsageError(
            f"{text!r} is not a profile version (32 lowercase hex digits); hemostat profile list shows them"
        )
    return text


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _natural(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _print_json(value: Any) -> None:
    import json  # noqa: PLC0415

    print(json.dumps(value, indent=2, ensure_ascii=False))  # noqa: T201
