"""Logs of every process: lines for people, or one JSON object a line for machines. Never what clients say or get."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Literal

Format = Literal["text", "json"]

REQUEST = "hemostat.request"
"""Logger of one line a request (`log.requests`)."""

FIELDS = (
    *("request_id", "route", "status", "outcome", "arm", "finish_reasons", "output_tokens", "seconds", "sampled"),
    "trace_id",
)
"""What a record may carry beside its message, as `extra`."""


class JsonFormatter(logging.Formatter):
    """`{"time", "level", "logger", "message", …}`, with those of `FIELDS` that the record carries."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """The usual line; fields of `FIELDS` behind it as key=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        said = [f"{name}={getattr(record, name)}" for name in FIELDS if hasattr(record, name)]
        return " ".join([super().formatMessage(record), *said])


def set_up(level: str, form: Format) -> None:
    """Of this process's root logger, to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # It would say every request that Hemostat itself makes.
    logging.getLogger("httpx").setLevel(logging.WARNING)
