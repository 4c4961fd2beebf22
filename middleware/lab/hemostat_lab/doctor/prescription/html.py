"""The page's section on the prescription: in words, a map of bits, and the comparison with uniform bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hemostat.report.formats import UNKNOWN, format_cell
from hemostat.report.heat_map import heat_map
from hemostat.report.page import Plot, Section, Table
from hemostat_lab.doctor.prescription.words import sentences, widths

Row = Mapping[str, Any]


def section(report: Row) -> Section | None:
    prescription = report.get("prescription")
    if prescription is None:
        return None
    skipped = prescription.get("skipped")
    return Section(
        "prescription/section.html.jinja",
        {
            "skipped": skipped,
            "sentences": [] if skipped else sentences(prescription),
            "plots_shown": [] if skipped else list(_map(prescription)),
            "compared": None if skipped else _compared(prescription),
        },
    )


def _map(prescription: Row) -> Iterator[Plot]:
    result = widths(prescription)
    if not result:
        return
    title = "Bits of each linear layer"
    rows = list(dict.fromkeys(module for module, _ in result))
    columns = sorted({layer for _, layer in result}, key=int)
    tooltips = {
        (module, layer): f"layer {layer} {module}: {bits} bits"
        + (f", groups of {group}" if group else "")
        + (f", {100 * sparsity:g} % zeros" if sparsity else "")
        for (module, layer), (bits, group, sparsity) in result.items()
    }
    values = {cell: float(bits) for cell, (bits, _, _) in result.items()}
    texts = {cell: str(bits) for cell, (bits, _, _) in result.items()}
    yield Plot(title, heat_map(title, rows, columns, values, "layer", "bits", tooltips, texts))


def _compared(prescription: Row) -> Table:
    return Table(
        f"KLD on {prescription['tokens']} tokens of {prescription['requests']} prompts; ± 1 standard error by request",
        ("", "bytes", "mean KLD, nats", "±", "more than prescribed", "±", "predicted"),
        [
            (
                row["name"],
                UNKNOWN if row["bytes"] is None else f"{row['bytes']:,}",
                *(
                    format_cell(row[name])
                    for name in (
                        "mean_kld",
                        "mean_kld_se_by_request",
                        "more_than_prescribed",
                        "more_se_by_request",
                        "predicted",
                    )
                ),
            )
            for row in prescription["compared"]
        ],
    )
