"""`hemostat engines`: the engines that requests go to, and taking one out of service, through the admin port."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from hemostat.commands.admin_port import add_admin_options, admin_json
from hemostat.commands.arguments import UsageError
from hemostat_calibration.messages import shown_address

HELP = "Show the engines behind a running hemostat serve, drain one, or end its drain."
COLUMNS = ("engine", "state", "in progress", "requests", "KL nats", "outlier", "profiles held")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_admin_options(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--drain",
        metavar="NAME",
        help="Drain the engine host:port: it gets no new requests, and finishes those in progress.",
    )
    which.add_argument(
        "--resume", metavar="NAME", help="End the drain of the engine host:port: it gets requests again."
    )
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    if options.drain is not None:
        status = admin_json(options, "POST", "/api/v1/engines/drain", json={"engine": options.drain})
    elif options.resume is not None:
        status = admin_json(options, "POST", "/api/v1/engines/undrain", json={"engine": options.resume})
    else:
        status = admin_json(options, "GET", "/api/v1/status")
    try:
        lines = [*problems(status["state"]["problems"]), table(status["upstream"])]
        lines += [*comparison(status["outlier_engine"]), *not_compared(status["canaries"]["failures"])]
    except (LookupError, TypeError, AttributeError):
        raise UsageError(
            f"{shown_address(options.admin)}: not the status of a hemostat serve of this version"
        ) from None
    print("\n".join(lines))  # noqa: T201
    return 0


def problems(reported: Sequence[dict[str, Any]]) -> list[str]:
    """Returns one line for each problem of the status block `state`, worst first."""
    return [
        f"{row['severity']}: {row['text']} (since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(row['since']))}; "
        f"{row['alert']} in the runbook)"
        for row in reported
    ]


def comparison(outlier_engine: dict[str, Any]) -> list[str]:
    """Returns one line where engines are not compared, of the status block `outlier_engine`."""
    return [f"outlier engine: off: {outlier_engine['detail']}"] if outlier_engine["state"] == "off" else []


def not_compared(failures: dict[str, str]) -> list[str]:
    """Returns one line for each engine whose canaries are not compared, of the status block `canaries`."""
    return [f"canaries: {engine} is not compared: {why}" for engine, why in failures.items()]


def table(engines: Sequence[dict[str, Any]]) -> str:
    """Returns one line for each engine of the status block `upstream`."""
    rows = [COLUMNS, *map(_row, engines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def _row(engine: dict[str, Any]) -> tuple[str, ...]:
    figures, held = engine["figures"], engine["holds"]
    kl = figures.get("kl_nats")
    farther = "further from" if figures.get("farther") else "closer to"
    return (
        engine["engine"],
        _state(engine),
        str(engine["outstanding"]),
        str(engine["requests"]),
        "-" if kl is None else f"{kl:.4f}",
        f"yes, {farther} the reference" if figures.get("outlier") else "no" if figures.get("requests") else "-",
        "not known" if held is None else str(len(held)),
    )


def _state(engine: dict[str, Any]) -> str:
    if engine["drained"]:
        return "drained"
    if engine.get("excluded"):
        return "excluded as an outlier"
    if engine["up"] == engine["relays"]:
        return "up"
    return f"up for {engine['up']} of {engine['relays']} relays" if engine["up"] else "failing"
