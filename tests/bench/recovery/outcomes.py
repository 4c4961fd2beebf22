"""What people see: greedy text with and without the profile, beside the reference's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # torch takes seconds to import
    from .engine import Written
    from .figures import Floats


def common_prefix(a: npt.NDArray[np.integer], b: npt.NDArray[np.integer]) -> int:
    """Length in tokens."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length


def is_json_object(text: str) -> bool:
    """True for a JSON object, alone or in a fenced block."""
    body = text.strip()
    if body.startswith("```"):
        body = body.removeprefix("```json").removeprefix("```").removesuffix("```").strip()
    try:
        return isinstance(json.loads(body), dict)
    except ValueError:
        return False


def holds_json_object(text: str) -> bool:
    """True where a JSON object is anywhere in the text: somebody who looks for it finds it."""
    for start in (n for n, character in enumerate(text) if character == "{"):
        try:
            json.JSONDecoder().raw_decode(text, start)
        except ValueError:
            continue
        return True
    return False


def same_answer(a: str, b: str) -> bool:
    """Equal but for case, white space and closing punctuation."""
    return " ".join(a.lower().split()).rstrip(".! ") == " ".join(b.lower().split()).rstrip(".! ")


def paired(before: Sequence[float], after: Sequence[float], name: str) -> dict[str, Any]:
    """Means of both arms, and their difference with a 95 % bootstrap interval over prompts."""
    from .figures import interval

    b, a = np.array(before, dtype=np.float64), np.array(after, dtype=np.float64)
    difference, low, high = interval(np.arange(len(b)), a - b, np.ones(len(b)), name)
    return {
        "prompts": len(b),
        "without": float(b.mean()),
        "with": float(a.mean()),
        "difference": difference,
        "ci95": [low, high],
    }


def compare(
    kinds: Sequence[str], reference: Sequence[Written], plain: Sequence[Written], treated: Sequence[Written]
) -> dict[str, Any]:
    """kinds: "open", "short" or "json", of each prompt; all three lists in the order of the prompts."""

    def of(kind: str, texts: Sequence[Written]) -> list[Written]:
        return [text for k, text in zip(kinds, texts, strict=True) if k == kind]

    def prefixes(kind: str, texts: Sequence[Written]) -> list[float]:
        pairs = zip(of(kind, reference), of(kind, texts), strict=True)
        return [float(common_prefix(r.output, t.output)) for r, t in pairs]

    def matches(kind: str, texts: Sequence[Written]) -> list[float]:
        return [float(same_answer(r.text, t.text)) for r, t in zip(of(kind, reference), of(kind, texts), strict=True)]

    def valid(texts: Sequence[Written], is_valid: Callable[[str], bool] = is_json_object) -> list[float]:
        return [float(is_valid(t.text)) for t in of("json", texts)]

    result = {
        "common_prefix_tokens": paired(prefixes("open", plain), prefixes("open", treated), "prefix"),
        "common_prefix_tokens_all": paired(
            [p for kind in ("open", "short", "json") for p in prefixes(kind, plain)],
            [p for kind in ("open", "short", "json") for p in prefixes(kind, treated)],
            "prefix of all",
        ),
        "short_answer_exact_match": paired(matches("short", plain), matches("short", treated), "match"),
        "json_exact_match": paired(matches("json", plain), matches("json", treated), "json match"),
        "json_valid": paired(valid(plain), valid(treated), "json"),
        "json_inside": paired(valid(plain, holds_json_object), valid(treated, holds_json_object), "json inside"),
    }
    result["json_valid"]["reference"] = float(np.mean(valid(reference)))
    result["json_inside"]["reference"] = float(np.mean(valid(reference, holds_json_object)))
    return result


def on_policy(
    control: Floats, control_topics: npt.NDArray[np.integer], treated: Floats, treated_topics: npt.NDArray[np.integer]
) -> dict[str, Any]:
    """KL(r‖what served) along each arm's own tokens, [T] each, with intervals by topic; both arms have the same topics.

    The difference is of means per token; topics are drawn together for both arms.
    """
    topics = np.unique(control_topics)
    assert np.array_equal(topics, np.unique(treated_topics))
    sums = [
        np.stack([np.bincount(np.searchsorted(topics, t), v), np.bincount(np.searchsorted(topics, t))])
        for t, v in ((control_topics, control), (treated_topics, treated))
    ]
    drawn = np.random.default_rng(17).integers(len(topics), size=(2000, len(topics)))
    (c, t) = (s[0][drawn].sum(1) / s[1][drawn].sum(1) for s in sums)

    def ends(values: Floats) -> list[float]:
        return [float(q) for q in np.quantile(values, [0.025, 0.975])]

    return {
        "control_tokens": len(control),
        "treated_tokens": len(treated),
        "kl_control": float(control.mean()),
        "kl_control_ci95": ends(c),
        "kl_treated": float(treated.mean()),
        "kl_treated_ci95": ends(t),
        "kl_won_back": 1.0 - float(treated.mean()) / float(control.mean()),
        "ci95": ends(1.0 - t / c),
    }
