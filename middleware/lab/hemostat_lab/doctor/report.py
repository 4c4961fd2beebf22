"""The tables of the report from the scored tokens, as JSON values. Pure; in nats unless stated otherwise.

Names and percentiles are those of llama.cpp's `llama-perplexity --kl-divergence` (tools/perplexity/perplexity.cpp):
Q is the compressed model, base the reference, KLD is KL(base‖Q) of a token, Δp = p_Q − p_base of the scored token,
percentiles interpolate linearly. Every standard error is given twice: by request, and by token as in llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hemostat_calibration.divergence.trajectory import Survival
from hemostat_lab.doctor.classes import CLASSES
from hemostat_lab.doctor.estimates import Estimate, Ints, Sample
from hemostat_lab.doctor.options import Decoding
from hemostat_lab.doctor.pair import ESTIMATE, FLOOR, UPPER, Floats, Scored, json_number

SCHEMA = 1

KLD_PERCENTILES = (99.9, 99.0, 95.0, 90.0, 50.0, 10.0, 5.0, 1.0, 0.1)
DELTA_P_PERCENTILES = (99.9, 99.0, 95.0, 90.0, 75.0, 50.0, 25.0, 10.0, 5.0, 1.0, 0.1)
ENTROPY_EDGES = (0.0, 0.1, 0.5, 1.0, 2.0, 3.0, math.inf)
"""Of the compressed model's entropy, nats."""
HISTOGRAM_DECADES = (-6, 2)
"""Range of the histogram of KLD, in powers of ten of nats; four bins per decade."""

PROMPT_LENGTH_EDGES = (1, 32, 128, 512)
"""Of the prompt, tokens."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PromptKind:
    """chat: messages, else a plain text. tokens: length of the prompt, template included."""

    chat: bool
    tokens: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """All scored tokens, concatenated: arrays [N]."""

    sample: Sample
    figures: Mapping[str, Floats]
    ids: Ints
    position: Ints
    """Within the scored text, from 0."""
    index: Ints
    """Of the prompt."""

    @classmethod
    def of(cls, scored: Sequence[Scored]) -> Tokens:
        lengths = [len(text.output) for text in scored]
        names = scored[0].figures.keys()
        return cls(
            sample=Sample(np.repeat(np.arange(len(scored)), lengths), len(scored)),
            figures={name: np.concatenate([text.figures[name] for text in scored]) for name in names},
            ids=np.concatenate([text.output for text in scored]).astype(np.int64),
            position=np.concatenate([np.arange(length) for length in lengths]),
            index=np.repeat([text.index for text in scored], lengths),
        )


def tables(
    scored: Sequence[Scored],
    classes: Mapping[int, str],
    lines: Sequence[int],
    worst: int,
    texts: Mapping[int, Decoding],
    prompts: Mapping[int, PromptKind],
) -> dict[str, Any]:
    """All tables.

    classes: token id -> class. lines: line in the prompt file by prompt. worst: rows of the worst lists.
    texts: prompt index -> which text was scored. prompts: prompt index -> its kind.
    """
    tokens = Tokens.of(scored)
    figures = tokens.figures
    entropy = np.digitize(figures["entropy_c"], ENTROPY_EDGES[1:-1])
    kind = np.array([CLASSES.index(classes[token]) for token in tokens.ids.tolist()])
    doubling = np.where(tokens.position == 0, 0, np.floor(np.log2(np.maximum(tokens.position, 1))).astype(int) + 1)
    forms = [f"{'chat' if prompts[text.index].chat else 'plain text'}, {texts[text.index]}" for text in scored]
    form_names = sorted(set(forms))
    form = np.repeat([form_names.index(name) for name in forms], [len(text.output) for text in scored])
    length = np.repeat(
        np.digitize([prompts[text.index].tokens for text in scored], PROMPT_LENGTH_EDGES[1:]),
        [len(text.output) for text in scored],
    )
    return {
        "requests": len(scored),
        "tokens": len(tokens.ids),
        "perplexity": _perplexity(tokens),
        "kl_divergence": _kl_divergence(tokens),
        "token_probability": _token_probability(tokens),
        "divergence": _divergence(tokens),
        "trajectory": _trajectory(scored, texts),
        "histogram": _histogram(figures["kl_rc"]),
        "by_position": _groups(tokens, doubling, _doubling_name),
        "by_class": _groups(tokens, kind, lambda n: CLASSES[n]),
        "by_entropy": _groups(tokens, entropy, _entropy_name),
        "by_form": _groups(tokens, form, lambda n: form_names[n]),
        "by_prompt_length": _groups(tokens, length, _length_name),
        "worst_tokens": _worst_tokens(tokens, classes, lines, worst),
        "worst_prompts": _worst_prompts(scored, lines, worst),
    }


def _row(name: str, estimate: Estimate, unit: str = "nats", scale: float = 1.0, of: str = "exact") -> Row:
    """of: `exact`, `at least`, `at most` or `estimate`."""
    return {
        "name": name,
        "of": of,
        "unit": unit,
        "value": json_number(scale * estimate.value),
        "se_by_request": json_number(scale * estimate.by_request),
        "se_by_token": json_number(scale * estimate.by_token),
    }


def _plain(name: str, value: float, unit: str, scale: float = 1.0, of: str = "exact") -> Row:
    return _row(name, Estimate(value, math.nan, math.nan), unit, scale, of)


def _perplexity(tokens: Tokens) -> list[Row]:
    sample = tokens.sample
    nll_q, nll_base = -tokens.figures["logp_c"], -tokens.figures["logp_r"]
    q, base = math.exp(nll_q.mean()), math.exp(nll_base.mean())
    spread = float(nll_q.std() * nll_base.std())
    covariance = float(((nll_q - nll_q.mean()) * (nll_base - nll_base.mean())).mean())

    def of(function: Callable[[float, float], float], by_q: float, by_base: float) -> Estimate:
        return sample.function(lambda means: function(means[0], means[1]), [by_q, by_base], nll_q, nll_base)

    return [
        _row("Mean PPL(Q)", of(lambda a, _: math.exp(a), q, 0.0), ""),
        _row("Mean PPL(base)", of(lambda _, b: math.exp(b), 0.0, base), ""),
        _plain("Cor(ln(PPL(Q)), ln(PPL(base)))", covariance / spread if spread else math.nan, "%", 100.0),
        _row("Mean ln(PPL(Q)/PPL(base))", of(lambda a, b: a - b, 1.0, -1.0)),
        _row("Mean PPL(Q)/PPL(base)", of(lambda a, b: math.exp(a - b), q / base, -q / base), ""),
        _row("Mean PPL(Q)-PPL(base)", of(lambda a, b: math.exp(a) - math.exp(b), q, -base), ""),
    ]


def _exact_or_bounds(tokens: Tokens, name: str) -> list[tuple[str, Floats]]:
    """(kind, values): the exact figure, or its lower and upper bounds."""
    if name + UPPER not in tokens.figures:
        return [("exact", tokens.figures[name])]
    return [("at least", tokens.figures[name]), ("at most", tokens.figures[name + UPPER])]


def _means(tokens: Tokens, label: str, name: str) -> list[Row]:
    rows = [_row(label, tokens.sample.mean(values), of=of) for of, values in _exact_or_bounds(tokens, name)]
    estimates = tokens.figures.get(name + ESTIMATE)
    if estimates is not None and not np.isnan(estimates).any():
        rows.insert(0, _row(label, tokens.sample.mean(estimates), of="estimate"))
    return rows


def _kl_divergence(tokens: Tokens) -> list[Row]:
    rows = _means(tokens, "Mean    KLD", "kl_rc")
    for label, percentile in (
        ("Maximum KLD", 100.0),
        *((_percentile(p, "KLD"), p) for p in KLD_PERCENTILES),
        ("Minimum KLD", 0.0),
    ):
        rows += [
            _plain(label, float(np.percentile(values, percentile)), "nats", of=of)
            for of, values in _exact_or_bounds(tokens, "kl_rc")
        ]
    return rows


def _token_probability(tokens: Tokens) -> list[Row]:
    delta = np.exp(tokens.figures["logp_c"]) - np.exp(tokens.figures["logp_r"])
    rows = [_row("Mean    Δp", tokens.sample.mean(delta), "%", 100.0)]
    for label, percentile in (
        ("Maximum Δp", 100.0),
        *((_percentile(p, "Δp"), p) for p in DELTA_P_PERCENTILES),
        ("Minimum Δp", 0.0),
    ):
        rows.append(_plain(label, float(np.percentile(delta, percentile)), "%", 100.0))
    rms = math.sqrt(float((delta**2).mean()))
    of_square = tokens.sample.function(lambda means: math.sqrt(means[0]), [0.5 / rms if rms else 0.0], delta**2)
    rows.append(_row("RMS Δp", of_square, "%", 100.0))
    rows.append(_row("Same top p", tokens.sample.mean(tokens.figures["same_top"]), "%", 100.0))
    return rows


def _percentile(percentile: float, of: str) -> str:
    return f"Median  {of}" if percentile == 50.0 else f"{percentile:4.1f}%   {of}"


def _divergence(tokens: Tokens) -> list[Row]:
    figures, sample = tokens.figures, tokens.sample
    rows = _means(tokens, "KL(r‖c)", "kl_rc")
    if not np.isnan(figures[FLOOR]).all():
        measured = ~np.isnan(figures[FLOOR])
        chosen = sample.select(measured)
        floor = figures[FLOOR][measured]
        rows.append(_row("noise floor: c in one prefill ‖ c in two", chosen.mean(floor)))
        rows.append(_row("KL(r‖c) above the floor", chosen.mean(figures["kl_rc"][measured] - floor)))
    rows += _means(tokens, "KL(c‖r)", "kl_cr")
    rows += _means(tokens, "Jensen–Shannon", "js")
    rows += [_row("total variation", sample.mean(v), "", of=of) for of, v in _exact_or_bounds(tokens, "tv")]
    exact = "exact" if "kl_rc" + UPPER not in figures else "at least"
    rows.append(_row("entropy H(r)", sample.mean(figures["entropy_r"]), of=exact))
    rows.append(_row("entropy H(c)", sample.mean(figures["entropy_c"]), of=exact))
    if exact == "exact":
        rows.append(_row("entropy shift H(c) − H(r)", sample.mean(figures["entropy_c"] - figures["entropy_r"])))
    return rows


def _histogram(values: Floats) -> dict[str, Any]:
    """Share of tokens by KLD. Values outside the range are in the first and the last bin."""
    low, high = HISTOGRAM_DECADES
    edges = 10.0 ** np.linspace(low, high, 4 * (high - low) + 1)
    bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    return {
        "edges_nats": edges.tolist(),
        "share": (np.bincount(bins, minlength=len(edges) - 1) / len(values)).tolist(),
    }


def _groups(tokens: Tokens, group: npt.NDArray[np.integer[Any]], name: Callable[[int], str]) -> list[Row]:
    """One row for each group that has tokens. group: int [N]."""
    figures = tokens.figures
    total = float(figures["kl_rc"].sum())
    rows = []
    for number in np.unique(group).tolist():
        chosen = group == number
        sample = tokens.sample.select(chosen)
        kld = figures["kl_rc"][chosen]
        rows.append(
            {
                "name": name(number),
                "tokens": int(chosen.sum()),
                "requests": sample.requests,
                "kld": _row("Mean KLD", sample.mean(kld), of=_exact_or_bounds(tokens, "kl_rc")[0][0]),
                "excess": _row(
                    "Mean KLD minus that of the other tokens",
                    _contrast(tokens.sample, figures["kl_rc"], chosen),
                    of=_exact_or_bounds(tokens, "kl_rc")[0][0],
                ),
                "tv": _row(
                    "total variation", sample.mean(figures["tv"][chosen]), "", of=_exact_or_bounds(tokens, "tv")[0][0]
                ),
                "same_top": _row("Same top p", sample.mean(figures["same_top"][chosen]), "%", 100.0),
                "share_of_kld": json_number(kld.sum() / total) if total else None,
            }
        )
    return rows


def _contrast(sample: Sample, values: Floats, chosen: npt.NDArray[np.bool_]) -> Estimate:
    """Mean over the chosen tokens minus the mean over the others; NaN where there are no others."""
    inside = chosen.astype(np.float64)
    share = float(inside.mean())
    if not 0.0 < share < 1.0:
        return Estimate(math.nan, math.nan, math.nan)
    ours, theirs = float((values * inside).mean()), float((values * (1.0 - inside)).mean())
    return sample.function(
        lambda means: means[0] / means[2] - means[1] / (1.0 - means[2]),
        [1.0 / share, -1.0 / (1.0 - share), -ours / share**2 - theirs / (1.0 - share) ** 2],
        values * inside,
        values * (1.0 - inside),
        inside,
    )


def _length_name(number: int) -> str:
    low, more = PROMPT_LENGTH_EDGES[number], PROMPT_LENGTH_EDGES[number + 1 :]
    return f"{low}–{more[0] - 1} tokens" if more else f"{low} tokens and more"


def _doubling_name(number: int) -> str:
    if number < 2:
        return str(number)
    return f"{2 ** (number - 1)}–{2**number - 1}"


def _entropy_name(number: int) -> str:
    low, high = ENTROPY_EDGES[number], ENTROPY_EDGES[number + 1]
    return f"{low:g} and more" if math.isinf(high) else f"{low:g} to {high:g}"


def _trajectory(scored: Sequence[Scored], texts: Mapping[int, Decoding]) -> list[Row]:
    """Survival curves with their names and kinds; see `hemostat_calibration.divergence.trajectory`."""
    curves = []
    whole = UPPER not in "".join(scored[0].figures)
    # An upper bound of TV gives a lower bound of survival.
    for of, name in (("exact", "tv"),) if whole else (("at least", "tv" + UPPER), ("at most", "tv")):
        curves.append(_curve("coupled, from TV", of, [1.0 - text.figures[name] for text in scored]))
    sampled = [text.figures for text in scored if texts[text.index] == "sampled"]
    if sampled:
        ratios = [np.exp(np.minimum(figures["logp_r"] - figures["logp_c"], 0.0)) for figures in sampled]
        curves.append(_curve("coupled, from the sampled tokens", "exact", ratios))
    greedy = [text.figures["same_top"] for text in scored if texts[text.index] == "greedy"]
    if greedy:
        curves.append(_curve("greedy", "exact", greedy))
    if len(greedy) < len(scored):
        others = [text.figures["same_top"] for text in scored if texts[text.index] != "greedy"]
        curves.append(_curve("greedy, from same top p", "estimate", others))
    return curves


def _curve(name: str, of: str, factors: Sequence[Floats]) -> Row:
    survival = Survival()
    for factor in factors:
        survival = survival.update(np.clip(factor, 0.0, 1.0))
    curve = survival.get()
    return {
        "name": name,
        "of": of,
        "requests": curve.requests,
        "positions": curve.positions.tolist(),
        "survival": curve.survival.tolist(),
        "low": curve.low.tolist(),
        "high": curve.high.tolist(),
        "at_risk": curve.at_risk.tolist(),
        "half_life": json_number(curve.half_life),
        "half_life_ci95": [json_number(curve.half_life_low), json_number(curve.half_life_high)],
        "horizon": curve.horizon,
        "prefix": json_number(curve.prefix),
        "prefix_ci95": [json_number(curve.prefix_low), json_number(curve.prefix_high)],
    }


def _worst_tokens(tokens: Tokens, classes: Mapping[int, str], lines: Sequence[int], limit: int) -> list[Row]:
    figures = tokens.figures
    order = np.argsort(-figures["kl_rc"], kind="stable")[:limit]
    return [
        {
            "kld": json_number(figures["kl_rc"][n]),
            "line": lines[tokens.index[n]],
            "prompt": int(tokens.index[n]),
            "position": int(tokens.position[n]),
            "token_id": int(tokens.ids[n]),
            "class": classes[int(tokens.ids[n])],
            "p_base": json_number(np.exp(figures["logp_r"][n])),
            "p_q": json_number(np.exp(figures["logp_c"][n])),
        }
        for n in order.tolist()
    ]


def _worst_prompts(scored: Sequence[Scored], lines: Sequence[int], limit: int) -> list[Row]:
    means = np.array([text.figures["kl_rc"].mean() for text in scored])
    return [
        {
            "mean_kld": json_number(means[n]),
            "line": lines[scored[n].index],
            "prompt": scored[n].index,
            "tokens": len(scored[n].output),
            "tv": json_number(scored[n].figures["tv"].mean()),
            "same_top": json_number(scored[n].figures["same_top"].mean()),
            "ln_ppl_ratio": json_number((scored[n].figures["logp_r"] - scored[n].figures["logp_c"]).mean()),
        }
        for n in np.argsort(-means, kind="stable")[:limit].tolist()
    ]
