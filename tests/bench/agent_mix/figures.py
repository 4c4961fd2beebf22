"""From the status of Hemostat to the figures of the benchmark. Counts of several runs are added up."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


def reasons() -> dict[str, str]:
    """Reason of a request that is not scored -> its explanation, as docs/reference/metrics.md has it."""
    spec = importlib.util.spec_from_file_location("metrics_page", ROOT / "deploy" / "metrics.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {reason: text for by_reason in module.SHADOW_REASONS.values() for reason, text in by_reason.items()}


def explained(reason: str, texts: dict[str, str]) -> str:
    """The explanation of a reason; of one like `invalid_mass`, that of its family."""
    family = reason.partition("_")[0] + "_…"
    return texts.get(reason) or texts.get(family, "not explained")


def combine(coverages: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """`scored_share` of requests and tokens, `by_kind`, `by_entry` (of the mix), and `not_scored`, explained."""
    kinds: dict[str, dict[str, float]] = {}
    entries: dict[str, dict[str, float]] = {}
    unscored: dict[tuple[str, str], dict[str, float]] = {}
    total = _empty()
    for coverage in coverages:
        _add(total, coverage)
        for kind in coverage["by_kind"]:
            _add(kinds.setdefault(kind["kind"], _empty()), kind)
            _add(entries.setdefault(entry_of(kind["kind"]), _empty()), kind)
        for row in coverage["not_scored"]:
            into = unscored.setdefault((row["outcome"], row["reason"]), dict.fromkeys(_COUNTS, 0.0))
            for name in _COUNTS:
                into[name] += row[name]
    texts = reasons()
    return {
        "scored_share": _share(total, "requests"),
        "scored_share_tokens": _share(total, "tokens"),
        **_shown(total),
        "by_entry": _listed("entry", entries),
        "by_kind": _listed("kind", kinds),
        "not_scored": [
            {"outcome": outcome, "reason": reason, "explanation": explained(reason, texts), **_shown(counts)}
            for (outcome, reason), counts in sorted(unscored.items(), key=lambda item: -item[1]["requests"])
        ],
    }


def entry_of(kind: str) -> str:
    """The entry of the mix that a kind belongs to, by its label; of a kind without one, the kind itself.

    >>> entry_of("chat label tools-auto tools greedy"), entry_of("unread")
    ('tools-auto', 'unread')
    """
    match = re.search(r" label (\S+)", kind)
    return kind if match is None else match[1]


_COUNTS = ("requests", "tokens", "requests_of_unknown_tokens")


def _empty() -> dict[str, float]:
    return dict.fromkeys((*_COUNTS, "scored_requests", "scored_tokens"), 0.0)


def _add(into: dict[str, float], counts: dict[str, Any]) -> None:
    for name in _COUNTS:
        into[name] += counts[name]
    scored = counts["by_outcome"]["scored"]
    into["scored_requests"] += scored["requests"]
    into["scored_tokens"] += scored["tokens"]


def _listed(what: str, counts: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    return [
        {what: name, "scored_share": _share(count, "requests"), "scored_share_tokens": _share(count, "tokens")}
        | _shown(count)
        for name, count in sorted(counts.items())
    ]


def _share(counts: dict[str, float], of: str) -> float | None:
    return counts[f"scored_{of}"] / counts[of] if counts[of] else None


def _shown(counts: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in counts.items()}


def table(result: dict[str, Any]) -> str:
    """For people."""
    rows = [*result["by_entry"], {"entry": "all", **result}]
    lines = [
        f"{'request':24} {'requests':>8} {'scored':>8} {'tokens':>8} {'scored':>8}",
        *(
            f"{row['entry'][:24]:24} {row['requests']:8.1f} {_percent(row['scored_share'])} {row['tokens']:8.0f} "
            f"{_percent(row['scored_share_tokens'])}"
            for row in rows
        ),
        *(
            f"not scored: {row['requests']:.1f} requests, {row['tokens']:.0f} known tokens, {row['reason']}: "
            f"{row['explanation']}"
            for row in result["not_scored"]
        ),
    ]
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return f"{'–':>8}" if share is None else f"{share:8.1%}"
