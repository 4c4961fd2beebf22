"""The flags of `hemostat demo`, and the checks that need no running program."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hemostat.report.written_files import other_content
from hemostat_calibration.errors import HemostatError

RECORDS = "records.jsonl"
KEPT = {"reference", "compressed", "logs", RECORDS}
"""What `--keep` writes into the folder."""
REPORT_MARKER = b'"tokens_scored"'
PAGE_TITLE = "Hemostat demo"
PAGE_MARKER = f"<title>{PAGE_TITLE}".encode()
RECORDS_MARKER = b'"prompt_token_ids"'
"""What these files have near their beginning, by which they are recognized."""


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """The flags of `hemostat demo`."""

    requests: int | None = None
    """None: until Ctrl-C."""
    prompts: Path | None = None
    report: Path | None = None
    html: Path = Path("report.html")
    """The page with the result."""
    keep: Path | None = None
    """New, empty or of an earlier demo: gets `reference`, `compressed`, `records.jsonl` and the logs."""
    seed: int = 0
    compression: str = "w4a16"
    console: bool = True
    """False: plain lines instead of the live view."""
    overrides: tuple[str, ...] = ()
    """`KEY=VALUE`, for `hemostat serve --set`."""


class DemoFailure(HemostatError):
    """The demo cannot continue; the text says why."""


def check_destinations(options: DemoOptions) -> None:
    """Create the folders of `--keep`, `--report` and `--html`. Raises DemoFailure if one cannot be written to."""
    try:
        if options.keep is not None:
            options.keep.mkdir(parents=True, exist_ok=True)
        for file in (options.html, *([options.report] if options.report is not None else [])):
            file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoFailure(f"cannot write to {error.filename} ({error.strerror}); name another place") from None
    for flag, place in (
        ("--keep", options.keep),
        ("--report", options.report and options.report.parent),
        ("--html", options.html.parent),
    ):
        if place is not None and not os.access(place, os.W_OK):
            raise DemoFailure(f"{flag}: cannot write to {place}; name another place")
    for flag, written, marker in (
        ("--report", options.report, REPORT_MARKER),
        ("--html", options.html, PAGE_MARKER),
    ):
        if written is not None and written.is_dir():
            raise DemoFailure(f"{flag} {written}: is a folder; name a file")
        if written is not None and (refused := other_content(written, marker)):
            raise DemoFailure(f"{flag}: {refused}")
    if options.keep is not None:
        if others := sorted({path.name for path in options.keep.iterdir()} - KEPT):
            raise DemoFailure(f"--keep: {options.keep} holds {others[0]}, which is not of a demo; name another folder")
        if refused := other_content(options.keep / RECORDS, RECORDS_MARKER):
            raise DemoFailure(f"--keep: {refused}")
