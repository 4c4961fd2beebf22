"""The page's section on causes: sentences, the heat map of layers and modules, outliers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hemostat.report import svg
from hemostat.report.formats import format_cell
from hemostat.report.heat_map import heat_map
from hemostat.report.page import Plot, Section, Table
from hemostat_lab.doctor.causes.findings import NOTE

MAX_ROWS = 12
"""Of the tables of outliers, worst first."""

Row = Mapping[str, Any]


def section(report: Row) -> Section | None:
    if "findings" not in report:
        return None
    outliers = report["outliers"]
    return Section(
        "causes/section.html.jinja",
        {
            "note": NOTE,
            "findings": [(finding["topic"], finding["text"]) for finding in report["findings"]],
            "skipped": report["layers"].get("skipped"),
            "plots_shown": [*_layer_plots(report["layers"]), *_sink_plots(outliers)],
            "tables": [] if "skipped" in outliers else [_activations(outliers), _weights(outliers)],
        },
    )


def _layer_plots(layers: Row) -> Iterator[Plot]:
    if "skipped" in layers:
        return
    single = [row for row in layers["restored"] if row["kind"] == "layer"]
    if single:
        title = "KLD when one layer alone is compressed"
        yield Plot(
            title,
            svg.bar_chart(
                title,
                [row["name"].removeprefix("layer ") for row in single],
                [row["alone_nats"] or 0.0 for row in single],
                [row["alone_se_by_request"] for row in single],
                "layer",
                "nats (± 1 standard error)",
            ),
        )
    rows = layers["modules"]["rows"]
    if rows:
        title = "KLD when one linear layer alone is compressed"
        names = list(dict.fromkeys(row["module"] for row in rows))
        numbers = [str(row["layer"]) for row in layers["distances"]]
        values = {(row["module"], str(row["layer"])): row["alone_nats"] or 0.0 for row in rows}
        tooltips = {
            (row["module"], str(row["layer"])): f"layer {row['layer']} {row['module']}: "
            f"{format_cell(row['alone_nats'])} ± {format_cell(row['alone_se_by_request'])} nats"
            for row in rows
        }
        yield Plot(title, heat_map(title, names, numbers, values, "layer", "nats", tooltips))


def _sink_plots(outliers: Row) -> Iterator[Plot]:
    rows = [] if "skipped" in outliers else [r for r in outliers["sinks"] if r["first_norm_ratio"] is not None]
    if rows:
        title = "Hidden state at the first position, relative to the others"
        yield Plot(
            title,
            svg.bar_chart(
                title,
                [str(row["layer"]) for row in rows],
                [row["first_norm_ratio"] for row in rows],
                [row["first_norm_ratio_se_by_request"] for row in rows],
                "layer",
                "norm / median norm",
            ),
        )


def _activations(outliers: Row) -> Table:
    rows = [row for row in outliers["modules"] if row.get("channel_ratio") is not None]
    return Table(
        f"Activations, largest channels first; {outliers['positions']} positions of {outliers['requests']} prompts",
        ("inputs of", "channel", "magnitude / median", "largest / root mean square", "error of int8 by token"),
        [
            (
                f"layer {row['layer']} {row['module']}",
                str(row["channel"]),
                f"{row['channel_ratio']:.1f}",
                f"{row['crest']:.1f}",
                f"{100 * row['int8_error']:.2f} %",
            )
            for row in _worst(rows, "channel_ratio")
        ],
    )


def _weights(outliers: Row) -> Table:
    rows = [row for row in outliers["modules"] if row.get("inputs_share") is not None]
    return Table(
        "Error of weights, weighted by the activations: share in 1 % of the channels, largest first",
        ("linear layer", "input channels", "largest", "output channels", "largest", "|ΔW| / |W|"),
        [
            (
                f"layer {row['layer']} {row['module']}",
                f"{100 * row['inputs_share']:.1f} %",
                str(row["input"]),
                f"{100 * row['outputs_share']:.1f} %",
                str(row["output"]),
                f"{row['weight_error']:.3f}",
            )
            for row in _worst(rows, "inputs_share")
        ],
    )


def _worst(rows: Sequence[Row], name: str) -> list[Row]:
    return sorted(rows, key=lambda row: -row[name])[:MAX_ROWS]
