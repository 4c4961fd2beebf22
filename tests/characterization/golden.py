"""Golden files: how they are written, read and compared. Tests only read them; `record.py` writes them."""

from __future__ import annotations

import difflib
import json
import math
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "golden"
WIDTH = 200
MAX_SHOWN_LINES = 60
_NUMBER = re.compile(r"(?<= )-?\d+(\.\d+)?(e[+-]?\d+)?$", re.MULTILINE)
_BUCKET = re.compile(r'(\w+_bucket\{.*?),?le="([^"]+)"(.*\}) (\S+)')
_VERSION = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")


def rounded(value: float) -> float | str:
    """9 significant digits, at most 12 decimals: the same text with another BLAS or libm. Not finite: its name."""
    if not math.isfinite(value):
        return str(value)
    short = round(float(f"{value:.9g}"), 12)
    return 0.0 if short == 0.0 else short


def plain(value: Any) -> Any:
    """JSON-ready, with all floats rounded."""
    match value:
        case bool() | int() | str() | None:
            return value
        case float():
            return rounded(value)
        case dict():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case set() | frozenset():
            return sorted(plain(item) for item in value)
    raise TypeError(f"{type(value).__name__} has no golden form")


def dumps(value: Any) -> str:
    """Sorted JSON; what fits in a line is on one line, so that a difference is easy to read."""
    return _laid_out(plain(value), 0) + "\n"


def metrics(text: str) -> str:
    """A metrics exposition with its values rounded, and the buckets of one histogram series on one line."""
    lines: list[str] = []
    series = ""
    for line in _NUMBER.sub(lambda match: f"{rounded(float(match[0])):.12g}", text).splitlines():
        bucket = _BUCKET.fullmatch(line)
        name = f"{bucket[1]}{bucket[3]}" if bucket else ""
        if bucket and name == series:
            lines[-1] += f" {bucket[2]}={bucket[4]}"
        elif bucket:
            lines.append(f"{name} {bucket[2]}={bucket[4]}")
        else:
            lines.append(line)
        series = name
    return "\n".join(lines) + "\n"


def with_named_versions(steps: Any) -> str:
    """Golden text of `steps` with profile versions as `profile-1`, `profile-2`, ... by first appearance.

    The versions themselves are listed once, in `profiles`.
    """
    names: dict[str, str] = {}
    text = _VERSION.sub(lambda match: names.setdefault(match[0], f"profile-{len(names) + 1}"), dumps(steps))
    return dumps({"profiles": {name: version for version, name in names.items()}, "steps": json.loads(text)})


def difference(name: str, made: str) -> str:
    """ "" when the golden file `name` holds `made`, else the differing lines and how to record it anew."""
    path = FOLDER / name
    kept = path.read_text(encoding="utf-8") if path.exists() else ""
    if kept == made:
        return ""
    lines = list(
        difflib.unified_diff(kept.splitlines(), made.splitlines(), f"golden/{name}", "made now", "", "", 1, "")
    )
    more = [f"... {len(lines) - MAX_SHOWN_LINES} more lines"] if len(lines) > MAX_SHOWN_LINES else []
    hint = "if the change is meant: python -m tests.characterization.record"
    return "\n".join([*lines[:MAX_SHOWN_LINES], *more, hint])


def _laid_out(value: Any, depth: int) -> str:
    flat = json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=False)
    if len(flat) + depth <= WIDTH or not isinstance(value, dict | list) or not value:
        return flat
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {_laid_out(value[key], depth + 1)}" for key in sorted(value)]
        brackets = "{}"
    else:
        parts = [_laid_out(item, depth + 1) for item in value]
        brackets = "[]"
    pad = " " * (depth + 1)
    return f"{brackets[0]}\n" + ",\n".join(pad + part for part in parts) + f"\n{' ' * depth}{brackets[1]}"
