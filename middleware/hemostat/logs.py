"""The logs of every process: text lines, or one JSON object per line. Prompts and generated texts are never logged."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Literal

Format = Literal["text", "json"]

REQUEST = "hemostat.request"
"""The logger with one line per request (`log.requests`)."""

FIELDS = (
    *("request_id", "route", "status", "outcome", "arm", "finish_reasons", "output_tokens", "seconds", "sampled"),
    "trace_id",
)
"""The fields that a record may have besides its message, as `extra`."""


class JsonFormatter(logging.Formatter):
    """Formats a record as `{"time", "level", "logger", "message", …}`, followed by the fields of `FIELDS` that the
    record has.
    """

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
    """The usual line, followed by the fields of `FIELDS` as key=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = [f"{name}={getattr(record, name)}" for name in FIELDS if hasattr(record, name)]
        return " ".join([super().formatMessage(record), *fields])


def set_up(level: str, form: Format) -> None:
    """Configures the root logger of this process; it writes to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("httpx", "httpcore"):  # they would log every request that Hemostat itself makes
        logging.getLogger(name).setLevel(logging.WARNING)
