"""The report as terminal tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

UNKNOWN = "–"
BEFORE = 24
"""Characters shown of what came before a worst token."""
TEXT_NAMES = {
    "sampled": "the compressed model's own, drawn at temperature 1",
    "greedy": "the compressed model's own, greedy",
    "given": "given",
}


def picture(made: Mapping[str, Any]) -> RenderableType:
    """All of it, top to bottom."""
    return Group(*_parts(made))


def headline(made: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was compared, on what."""
    reference, compressed = made["reference"], made["compressed"]
    texts = "; ".join(f"{count} texts: {TEXT_NAMES[name]}" for name, count in made["texts"].items())
    known = (
        f"exact, all {made['vocab_size']:,} ids"
        if made["full_vocabulary"]
        else f"bounds and estimates from the top {made['top_k']} of {made['vocab_size']:,} ids"
    )
    return [
        ("reference (base, r)", f"{reference['name']}  {reference['dtype']}  {reference['digest'][:12]}"),
        ("compressed (Q, c)", f"{compressed['name']}  {compressed['dtype']}  {compressed['digest'][:12]}"),
        ("scored", f"{made['tokens']:,} tokens of {made['requests']} prompts ({made['prompt_file']})"),
        ("text", f"{texts}; seed {made['seed']}"),
        ("figures", f"{known}; nats; ± standard error by request (by token)"),
        *(("note", note) for note in made["notes"]),
    ]


def _parts(made: Mapping[str, Any]) -> Iterator[RenderableType]:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in headline(made):
        grid.add_row(name, value)
    yield grid
    for title, key in (
        ("Perplexity statistics", "perplexity"),
        ("KL divergence statistics", "kl_divergence"),
        ("Token probability statistics", "token_probability"),
        ("Divergence", "divergence"),
    ):
        yield _heading(title)
        yield _rows(made[key])
    for title, key in (
        ("By position in the scored text", "by_position"),
        ("By class of the scored token", "by_class"),
        ("By the compressed model's entropy, nats", "by_entropy"),
    ):
        yield _heading(title)
        yield _groups(made[key])
    yield _heading("How long both write the same text")
    yield _trajectory(made["trajectory"])
    yield _heading("Worst tokens")
    yield _worst(made["worst_tokens"], ("kld", "line", "position", "token_id", "class", "p_base", "p_q"))
    yield _heading("Worst prompts")
    yield _worst(made["worst_prompts"], ("mean_kld", "line", "tokens", "tv", "same_top", "ln_ppl_ratio"))
    yield _heading("Layers")
    yield from _layers(made["layers"])


def _heading(title: str) -> RenderableType:
    return Text(f"\n====== {title} ======", style="bold")


def number(value: float | None, unit: str = "nats") -> str:
    if value is None:
        return UNKNOWN
    return f"{value:.3f} %" if unit == "%" else f"{value:.6f}"


def error(row: Mapping[str, Any]) -> str:
    """`± 0.0123 (0.0045)`, empty for a figure without."""
    by_request, by_token = row["se_by_request"], row["se_by_token"]
    if by_request is None and by_token is None:
        return ""
    form = "{:.3f}" if row["unit"] == "%" else "{:.6f}"
    told = [UNKNOWN if value is None else form.format(value) for value in (by_request, by_token)]
    return f"± {told[0]} ({told[1]})"


def _rows(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    bounded = any(row["of"] != "exact" for row in rows)
    for row in rows:
        cells = [row["name"], number(row["value"], row["unit"]), error(row)]
        if bounded:
            cells.append("" if row["of"] == "exact" else row["of"])
        table.add_row(*cells)
    table.columns[1].justify = "right"
    return table


def _trajectory(curves: Sequence[Mapping[str, Any]]) -> Table:
    """The curves side by side: S(t) at a few t, the half-life, and the expected common prefix."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for curve in curves:
        table.add_column(
            curve["name"] + ("" if curve["of"] == "exact" else f", {curve['of']}"), justify="right", max_width=22
        )
    for t in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        if any(t in curve["positions"] for curve in curves):
            at = (dict(zip(curve["positions"], curve["survival"], strict=True)).get(t) for curve in curves)
            table.add_row(f"same after {t}", *map(percent, at))
    table.add_row(
        "half-life, tokens [95 %]",
        *(interval(c["half_life"], c["half_life_ci95"], f"> {c['positions'][-1]}") for c in curves),
    )
    table.add_row(
        "equal tokens [95 %]",
        *(f"{interval(c['prefix'], c['prefix_ci95'], UNKNOWN)} of {c['horizon']}" for c in curves),
    )
    return table


def interval(value: float | None, ends: Sequence[float | None], beyond: str) -> str:
    """`1.8 [1.5, 2.2]`; `beyond` stands for what the data do not reach."""
    low, high = (beyond if end is None else f"{end:.1f}" for end in ends)
    return f"{beyond if value is None else f'{value:.1f}'} [{low}, {high}]"


def _groups(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    of = rows[0]["kld"]["of"]
    extent = "" if of == "exact" else f", {of}"
    for name in ("tokens", f"Mean KLD{extent}", "", f"TV{extent}", "Same top p", "share of KLD"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['tokens']:,}",
            number(row["kld"]["value"])[:-2],
            UNKNOWN if row["kld"]["se_by_request"] is None else f"± {row['kld']['se_by_request']:.4f}",
            number(row["tv"]["value"])[:-2],
            percent(row["same_top"]["value"], 1.0),
            percent(row["share_of_kld"]),
        )
    return table


def percent(value: float | None, scale: float = 100.0) -> str:
    return UNKNOWN if value is None else f"{scale * value:.1f} %"


def cell(value: Any) -> str:
    if value is None:
        return UNKNOWN
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _worst(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Table:
    """Where texts are told, they stand for the token's id and class."""
    told = bool(rows) and "text" in rows[0]
    table = Table(box=None, padding=(0, 2, 0, 0))
    names = [name for name in names if not (told and name in ("token_id", "class"))]
    for name in names:
        table.add_column(name, justify="left" if name == "class" else "right", no_wrap=True)
    if told:  # the only column that may wrap: figures stay whole
        table.add_column("text", overflow="fold")
    for row in rows:
        table.add_row(*(cell(row[name]) for name in names), *([Text(_text(row))] if told else []))
    return table


def _text(row: Mapping[str, Any]) -> str:
    """A prompt, or a token in what came before it."""
    return repr(f"{row['before'][-BEFORE:]}⟨{row['text']}⟩" if "before" in row else row["text"])


def _layers(layers: Mapping[str, Any]) -> Iterator[RenderableType]:
    if "skipped" in layers:
        yield Text(f"left out: {layers['skipped']}")
        return
    yield Text(
        f"on {layers['tokens']} tokens of {layers['requests']} prompts, mean KLD {cell(layers['mean_kld'])} "
        f"± {cell(layers['mean_kld_se_by_request'])}; error: |c − r| / |r| of what stands after the layer; alone: of "
        "what this layer adds, given the reference's input; won back: with the reference's module in its place"
    )
    if layers["restored"]:
        best = sorted(layers["restored"], key=lambda row: -(row["won_nats"] or 0.0))[:3]
        yield Text("helps most: " + ", ".join(f"{row['name']} ({percent(row['won_share'])})" for row in best))
    restored = {row["name"]: row for row in layers["restored"]}
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("layer", "error", "cosine", "alone", "won back, nats", "", "share"):
        table.add_column(name, justify="right")
    for row in layers["distances"]:
        table.add_row(
            str(row["layer"]),
            f"{row['accumulated']:.4f}",
            f"{row['cosine']:.5f}",
            f"{row['alone']:.4f}",
            *_won(restored.pop(f"layer {row['layer']}", None)),
        )
    yield table
    others = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("elsewhere", "won back, nats", "", "share"):
        others.add_column(name, justify="left" if name == "elsewhere" else "right")
    for name, row in restored.items():
        others.add_row(name, *_won(row))
    if restored:
        yield others


def _won(row: Mapping[str, Any] | None) -> tuple[str, str, str]:
    if row is None:
        return ("equal", "", "")
    error = row["won_se_by_request"]
    return (f"{row['won_nats']:+.4f}", UNKNOWN if error is None else f"± {error:.4f}", percent(row["won_share"]))
