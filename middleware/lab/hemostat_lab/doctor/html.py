"""The report as one HTML page (Jinja2, extra `report`): its frame, and the section of a pair of models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hemostat.config import packages
from hemostat.report import page, svg
from hemostat.report.formats import (
    UNKNOWN,
    format_cell,
    format_errors,
    format_interval,
    format_percent,
    format_value,
)
from hemostat.report.page import Card, Plot, Section, Table
from hemostat_lab.doctor.causes import html as causes
from hemostat_lab.doctor.options import DoctorError
from hemostat_lab.doctor.prescription import html as prescription
from hemostat_lab.doctor.sweep.page import sweep_section
from hemostat_lab.doctor.terminal import summary

Row = Mapping[str, Any]


def require_jinja() -> None:
    """Raise DoctorError when the page cannot be made because Jinja2 is not installed."""
    if missing := packages.missing("report"):
        raise DoctorError(f"--html: {missing}")


def render(report: Row) -> str:
    """The whole document. It contains prompts and completions only if the report does (`--show-text`)."""
    sections = [result for section in SECTIONS if (result := section(report)) is not None]
    return page.render("hemostat_lab.doctor", title(report), report["hemostat"], sections)


def title(report: Row) -> str:
    if "compressed" not in report:
        return f"Hemostat doctor: {report['reference']['name']}"
    return f"Hemostat doctor: {report['compressed']['name']} against {report['reference']['name']}"


def pair_section(report: Row) -> Section | None:
    """How far two models differ."""
    if "kl_divergence" not in report:
        return None
    layers = report["layers"]
    values = {
        "summary": summary(report),
        "cards_shown": list(_cards(report)),
        "plots_shown": list(_plots(report)),
        "statistic_tables": [
            _statistics("Perplexity statistics", report["perplexity"]),
            _statistics("KL divergence statistics", report["kl_divergence"]),
            _statistics("Token probability statistics", report["token_probability"]),
            _statistics("More divergences", report["divergence"]),
        ],
        "trajectory": _trajectory(report["trajectory"]),
        "worst_tokens": _worst(
            "By KLD; positions count from 0 in the scored text",
            report["worst_tokens"],
            ("kld", "line", "position", "token_id", "class", "p_base", "p_q"),
        ),
        "worst_prompts": _worst(
            "By mean KLD",
            report["worst_prompts"],
            ("mean_kld", "line", "tokens", "tv", "same_top", "ln_ppl_ratio"),
        ),
        "layers_skipped": layers.get("skipped"),
        "layers": None if "skipped" in layers else _layers(layers),
    }
    return Section("pair.html.jinja", values)


SECTIONS: tuple[Callable[[Row], Section | None], ...] = (
    pair_section,
    causes.section,
    prescription.section,
    sweep_section,
)
"""In the order of the page; each gives None where the report has nothing for it."""


def _cards(report: Row) -> Iterator[Card]:
    # Of servers the first row is the estimate, or the lower bound where there is none; `_kind` adds which it is.
    for title, row in (
        ("Mean KLD, nats", report["kl_divergence"][0]),
        ("Total variation", next(r for r in report["divergence"] if r["name"] == "total variation")),
        ("Same top p", report["token_probability"][-1]),
        ("PPL(Q)/PPL(base)", report["perplexity"][4]),
    ):
        if row["value"] is None:
            value = UNKNOWN
        else:
            value = f"{row['value']:.1f} %" if row["unit"] == "%" else f"{row['value']:.4f}"
        yield Card(f"{title}{_kind(row)}", value, format_errors(row))
    curve = report["trajectory"][0]
    half_life, _, bounds = _half_life(curve).partition(" [")
    yield Card(f"Median tokens before the texts diverge{_kind(curve)}", half_life, f"[{bounds}")


def _half_life(curve: Row) -> str:
    return format_interval(curve["half_life"], curve["half_life_ci95"], f"> {curve['positions'][-1]}")


def _kind(row: Row) -> str:
    """`, at least` and so on; empty for an exact figure."""
    return "" if row["of"] == "exact" else f", {row['of']}"


def _plots(report: Row) -> Iterator[Plot]:
    histogram = report["histogram"]
    labels = [f"{edge:.2g}" for edge in histogram["edges_nats"][:-1]]
    kind = _kind(report["by_position"][0]["kld"])
    yield Plot(
        f"Distribution of KLD{kind}",
        svg.bar_chart(
            f"Share of tokens by KLD{kind}",
            labels,
            [100.0 * share for share in histogram["share"]],
            [None] * len(labels),
            "KLD, nats, lower edge of the bin (log scale)",
            "% of tokens",
        ),
    )
    yield Plot(
        "Survival: probability that the texts have not diverged yet",
        svg.line_chart(
            "Survival by token",
            [
                svg.Series(
                    f"{curve['name']}{_kind(curve)}",
                    [0, *curve["positions"]],
                    [1.0, *curve["survival"]],
                    [1.0, *curve["low"]],
                    [1.0, *curve["high"]],
                )
                for curve in report["trajectory"]
            ],
            "tokens",
            "probability (band: 95 %)",
            1.0,
        ),
    )
    for title, key, x_name in (
        (f"Mean KLD by position{kind}", "by_position", "position in the scored text"),
        (f"Mean KLD by the compressed model's entropy{kind}", "by_entropy", "entropy, nats"),
    ):
        yield Plot(title, svg.bar_chart(title, *_bars(report[key]), x_name, "nats (± 1 standard error)"))
    title = f"Mean KLD by class of the scored token{kind}"
    yield Plot(title, svg.horizontal_bar_chart(title, *_bars(report["by_class"]), "nats (± 1 standard error)"))
    if "skipped" not in report["layers"]:
        yield from _layer_plots(report["layers"])


def _layer_plots(layers: Row) -> Iterator[Plot]:
    numbers = [row["layer"] for row in layers["distances"]]
    accumulated = [row["accumulated"] for row in layers["distances"]]
    alone = [row["alone"] for row in layers["distances"]]
    yield Plot(
        "Relative error of each layer",
        svg.line_chart(
            "Relative error by layer",
            [
                svg.Series("accumulated: hidden state after the layer", numbers, accumulated),
                svg.Series("alone: what the layer adds, on the reference's input", numbers, alone),
            ],
            "layer",
            "|c − r| / |r|",
        ),
    )
    single = [row for row in layers["restored"] if row["kind"] == "layer"]
    others = [row for row in layers["restored"] if row["kind"] != "layer"]
    error_name = "nats (± 1 standard error)"
    if single:
        title = "Reduction of KLD by restoring one layer"
        yield Plot(title, svg.bar_chart(title, *_restored_bars(single), "layer", error_name))
    if others:
        title = "Reduction of KLD by restoring one kind of module"
        yield Plot(title, svg.horizontal_bar_chart(title, *_restored_bars(others), error_name))


def _bars(rows: Sequence[Row]) -> tuple[list[str], list[float], list[float | None]]:
    """Labels, values and standard errors."""
    return (
        [row["name"] for row in rows],
        [row["kld"]["value"] or 0.0 for row in rows],
        [row["kld"]["se_by_request"] for row in rows],
    )


def _restored_bars(rows: Sequence[Row]) -> tuple[list[str], list[float], list[float | None]]:
    return (
        [row["name"].removeprefix("layer ") for row in rows],
        [row["won_nats"] or 0.0 for row in rows],
        [row["won_se_by_request"] for row in rows],
    )


def _statistics(caption: str, rows: Sequence[Row]) -> Table:
    return Table(
        caption,
        ("", "value", "±", ""),
        [
            (
                row["name"],
                format_value(row["value"], row["unit"]),
                format_errors(row),
                "" if row["of"] == "exact" else row["of"],
            )
            for row in rows
        ],
    )


def _trajectory(curves: Sequence[Row]) -> Table:
    return Table(
        "Tokens, with 95 % intervals by request",
        ("", "median (half-life)", "mean common prefix", "of at most"),
        [
            (
                f"{curve['name']}{_kind(curve)}",
                _half_life(curve),
                format_interval(curve["prefix"], curve["prefix_ci95"], UNKNOWN),
                str(curve["horizon"]),
            )
            for curve in curves
        ],
    )


def _worst(caption: str, rows: Sequence[Row], names: Sequence[str]) -> Table:
    texts = [name for name in ("before", "text") if rows and name in rows[0]]
    return Table(
        caption,
        (*names, *texts),
        [[*(format_cell(row[name]) for name in names), *(row[text] for text in texts)] for row in rows],
        len(texts),
    )


def _layers(layers: Row) -> Table:
    best_first = sorted(layers["restored"], key=lambda row: -(row["won_nats"] or 0.0))
    return Table(
        f"Reduction of KLD by restoring the reference's module, largest first; on {layers['tokens']} tokens of "
        f"{layers['requests']} prompts, mean KLD {format_cell(layers['mean_kld'])} nats",
        ("restored", "reduction, nats", "± by request", "share"),
        [
            (
                row["name"],
                UNKNOWN if row["won_nats"] is None else f"{row['won_nats']:+.4f}",
                format_cell(row["won_se_by_request"]),
                format_percent(row["won_share"]),
            )
            for row in best_first
        ],
    )
