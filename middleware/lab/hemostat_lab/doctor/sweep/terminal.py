"""The sweep as terminal tables; the cells are those of the page, too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hemostat.report.formats import UNKNOWN
from hemostat_lab.doctor.terminal import heading, named

Row = Mapping[str, Any]

HEADS = (
    "point", "size", "texts", "KL(r‖c), nats", "KL(c‖r)", "same top-1", "TV", "half-life, tokens", "PPL ratio",
    "JSON parses", "JSON right", "answers right",
)  # fmt: skip
SHOWN = (0, 1, 2, 3, 5, 7, 8, 9, 10, 11)
"""Columns that fit into a terminal; the page has all."""
COUNTS = (9, 10, 11)
"""Columns that have no interval there."""
THRESHOLD_HEADS = ("curve", "above the noise floor from", "not shown to be at", "perplexity doubled from", "breaks")
OUTCOME_NAMES = {
    "json_parses": "JSON that parses",
    "json_correct": "JSON with the right fields",
    "short_correct": "right short answers",
}
EXPLANATION = (
    "r is the unchanged model, which wrote the texts; [95 % by request]. size: of the linear layers, as a share of 16 "
    "bits for each weight. * on the front of size and KL. half-life: tokens after which Π(1 − TV) is ½."
)


def render(report: Row) -> RenderableType:
    return Group(*_parts(report))


def summary(report: Row) -> list[tuple[str, str]]:
    """(name, value) of the model and the texts."""
    reference, sweep = report["reference"], report["sweep"]
    most = max(row["requests"] for row in sweep["table"])
    texts = f"up to {most} of the reference ({report['prompt_file']}), at most {report['max_new_tokens']} tokens each"
    result = [
        ("reference (r)", f"{reference['name']}  {reference['dtype']}  {reference['digest'][:12]}"),
        (
            "points",
            f"{len(sweep['table'])} of {sweep['points']} measured; by rung: {', '.join(map(str, sweep['rungs']))}",
        ),
        ("texts", f"{texts}; seed {report['seed']}"),
        ("noise floor", f"{_number(sweep['floor'])} nats: r computed in one piece ‖ r computed in two"),
        ("figures", f"exact, all {report['vocab_size']:,} ids; nats per token; {EXPLANATION}"),
        ("cost", f"{sweep['seconds']:,.0f} s, {sweep['cpu_seconds']:,.0f} CPU seconds in this run"),
    ]
    for name in sweep["base_too_low"]:
        base = sweep["table"][0]["outcomes"][name]
        text = f"the reference itself has {OUTCOME_NAMES[name]} in {base['count']} of {base['of']}"
        result.append(("note", f"{text}: no loss can be read from it"))
    return [*result, *(("note", note) for note in report["notes"])]


def _parts(report: Row) -> Iterator[RenderableType]:
    sweep = report["sweep"]
    yield named(summary(report))
    yield heading("The paper's statements, on this model")
    for statement in sweep["statements"]:
        yield Text(f"{statement['verdict']}: {statement['statement']}; {statement['evidence']}")
        for pair in statement["comparisons"]:
            yield Text(f"    {comparison(pair)}")
    yield heading("Thresholds")
    yield _table(THRESHOLD_HEADS, threshold_rows(sweep))
    yield heading("Points")
    rows = [
        [cell.partition(" [")[0] if n in COUNTS else cell for n, cell in enumerate(row)] for row in point_rows(sweep)
    ]
    yield _table([HEADS[n] for n in SHOWN], [[row[n] for n in SHOWN] for row in rows])


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    for n, head in enumerate(heads):
        table.add_column(head, justify="right" if n else "left", no_wrap=not n)
    for row in rows:
        table.add_row(*row)
    return table


def point_rows(sweep: Row) -> list[list[str]]:
    return [cells(row) for row in (*sweep["table"], *([sweep["given"]] if "given" in sweep else []))]


def cells(row: Row) -> list[str]:
    life = row["half_life"]
    unknown = f"> {life['above']}"
    return [
        row["name"] + (" *" if row["on_front"] else ""),
        UNKNOWN if row["bytes_share"] is None else f"{100 * row['bytes_share']:.1f} %",
        str(row["requests"]),
        _kl(row["kl_rc"], row),
        _kl(row["kl_cr"], row),
        _interval(row["same_top"], "{:.1f} %", 100.0),
        _interval(row["tv"], "{:.3f}"),
        _interval(life, "{:.1f}", 1.0, unknown),
        _interval(row["perplexity_ratio"], "{:.4g}"),
        *(_count(row["outcomes"][name]) for name in OUTCOME_NAMES),
    ]


def threshold_rows(sweep: Row) -> list[list[str]]:
    return [
        [
            curve["name"],
            *(setting(curve, curve[name]) for name in ("leaves_floor", "below", "doubles")),
            "too few settings" if curve["break"] is None else curve["break"]["text"],
        ]
        for curve in sweep["curves"]
    ]


def comparison(pair: Row) -> str:
    low, high = pair["ci95"]
    return f"{pair['worse']} − {pair['better']}: {_number(pair['difference'])} [{_number(low)}, {_number(high)}] nats"


def setting(curve: Row, value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return f"{100 * value:g} %" if curve["unit"] == "sparsity" else f"{value:g}"


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.4g}"


def _kl(interval: Row, row: Row) -> str:
    if interval["value"] is None:
        return f"∞ at {100 * row['unbounded_share']:.0f} %" if row["unbounded_share"] else "∞"
    return _interval(interval, "{:.4f}")


def _interval(interval: Row, form: str, scale: float = 1.0, unknown: str = UNKNOWN) -> str:
    value, low, high = (
        unknown if interval[name] is None else form.format(scale * interval[name]) for name in ("value", "low", "high")
    )
    return f"{value} [{low.removesuffix(' %')}, {high.removesuffix(' %')}]"


def _count(row: Row) -> str:
    if row["value"] is None:
        return UNKNOWN
    return f"{row['count']} of {row['of']} [{100 * row['low']:.0f}, {100 * row['high']:.0f}] %"
