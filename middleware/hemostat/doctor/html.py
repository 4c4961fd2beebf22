"""The report as one HTML page: no script, nothing fetched, light and dark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from hemostat.doctor import svg
from hemostat.doctor.terminal import UNKNOWN, cell, error, headline, interval, number, percent

# Contrast of text on the background is at least 7 to 1, of bars and lines at least 3 to 1, in both schemes.
STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --quiet: #4a5260; --rule: #d5dae1; --card: #f5f7f9;
  --s0: #1565c0; --s1: #b3261e; --s2: #2e7d32; --s3: #7b3fa0; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e8eaed; --quiet: #b4bbc5; --rule: #39404a;
  --card: #1d2126; --s0: #7ab3f5; --s1: #f28b82; --s2: #81c995; --s3: #cf9fee; } }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 1rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
p, dd { margin: 0 0 .5rem; } .quiet, caption, dt { color: var(--quiet); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: 1rem; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 6px; padding: .75rem 1rem; }
.card b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; overflow-x: auto; } figcaption { font-weight: 600; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
caption { text-align: left; padding: .25rem 0; }
th, td { text-align: right; padding: .15rem .75rem .15rem 0; border-bottom: 1px solid var(--rule); }
td { white-space: nowrap; }
th:first-child, .text { text-align: left; }
td.text { white-space: normal; max-width: 40rem; overflow-wrap: anywhere; }
tbody th { font-weight: 400; }
svg { width: 100%; min-width: 30rem; height: auto; } svg text { fill: var(--quiet); font: 12px system-ui, sans-serif; }
line.grid { stroke: var(--rule); } .bar { fill: var(--s0); }
.whisker { stroke: var(--ink); stroke-width: 1.5; } .line { fill: none; stroke-width: 2; } .band { opacity: .18; }
.line.s0 { stroke: var(--s0); } .line.s1 { stroke: var(--s1); stroke-dasharray: 7 3; }
.line.s2 { stroke: var(--s2); stroke-dasharray: 2 3; } .line.s3 { stroke: var(--s3); stroke-dasharray: 9 3 2 3; }
.band.s0 { fill: var(--s0); } .band.s1 { fill: var(--s1); } .band.s2 { fill: var(--s2); } .band.s3 { fill: var(--s3); }
"""

Row = Mapping[str, Any]


def page(made: Row) -> str:
    """A whole document; texts only where the report holds them."""
    title = f"Hemostat doctor: {made['compressed']['name']} against {made['reference']['name']}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(_sections(made))
        + f'\n</main>\n<footer class="quiet">Hemostat {escape(made["hemostat"])}</footer>\n</body>\n</html>\n'
    )


def _sections(made: Row) -> Iterator[str]:
    yield "<dl>" + "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, b in headline(made)) + "</dl>"
    yield '<div class="cards">' + "".join(_cards(made)) + "</div>"
    yield '<h2>Where it differs</h2><div class="grid">' + "".join(_plots(made)) + "</div>"
    yield "<h2>The statistics of llama.cpp</h2>"
    yield '<p class="quiet">Q is the compressed model, base the reference. ± standard error by request (by token).</p>'
    yield '<div class="grid">'
    for title, key in (
        ("Perplexity statistics", "perplexity"),
        ("KL divergence statistics", "kl_divergence"),
        ("Token probability statistics", "token_probability"),
        ("More divergences", "divergence"),
    ):
        yield _statistics(title, made[key])
    yield "</div>"
    yield "<h2>How long both write the same text</h2>" + _trajectory(made["trajectory"])
    yield "<h2>Worst tokens</h2>" + _worst(
        "By KLD; positions count from 0 in the scored text",
        made["worst_tokens"],
        ("kld", "line", "position", "token_id", "class", "p_base", "p_q"),
    )
    yield "<h2>Worst prompts</h2>" + _worst(
        "By mean KLD", made["worst_prompts"], ("mean_kld", "line", "tokens", "tv", "same_top", "ln_ppl_ratio")
    )
    yield "<h2>Layers</h2>" + _layers(made["layers"])


def _cards(made: Row) -> Iterator[str]:
    # Where there are bounds only, the first is the lower one, and says so; an estimate comes before it.
    for title, row in (
        ("Mean KLD, nats", made["kl_divergence"][0]),
        ("Total variation", next(r for r in made["divergence"] if r["name"] == "total variation")),
        ("Same top p", made["token_probability"][-1]),
        ("PPL(Q)/PPL(base)", made["perplexity"][4]),
    ):
        value = UNKNOWN if row["value"] is None else f"{row['value']:.1f} %" if row["unit"] == "%" else _short(row)
        yield _card(f"{title}{_extent(row)}", value, error(row))
    curve = made["trajectory"][0]
    half = interval(curve["half_life"], curve["half_life_ci95"], f"> {curve['positions'][-1]}")
    yield _card(f"Half-life of a common text, tokens{_extent(curve)}", half.split(" [")[0], half.partition(" ")[2])


def _short(row: Row) -> str:
    return f"{row['value']:.4f}"


def _extent(row: Row) -> str:
    return "" if row["of"] == "exact" else f", {row['of']}"


def _card(title: str, value: str, below: str) -> str:
    return f'<div class="card">{escape(title)}<b>{escape(value)}</b><span class="quiet">{escape(below)}</span></div>'


def _plots(made: Row) -> Iterator[str]:
    histogram = made["histogram"]
    labels = [f"{edge:.2g}" for edge in histogram["edges_nats"][:-1]]
    of = _extent(made["by_position"][0]["kld"])
    yield _figure(
        f"How KLD is distributed{of}",
        svg.columns(
            f"Share of tokens by KLD{of}",
            labels,
            [100.0 * share for share in histogram["share"]],
            [None] * len(labels),
            "KLD, nats, from (log scale)",
            "% of tokens",
        ),
    )
    yield _figure(
        "Survival: both have written the same text so far",
        svg.lines(
            "Survival by token",
            [
                svg.Series(
                    f"{curve['name']}{_extent(curve)}",
                    [0, *curve["positions"]],
                    [1.0, *curve["survival"]],
                    [1.0, *curve["low"]],
                    [1.0, *curve["high"]],
                )
                for curve in made["trajectory"]
            ],
            "tokens",
            "share (band: 95 %)",
            1.0,
        ),
    )
    for title, key, x_name in (
        (f"Mean KLD by position{of}", "by_position", "position in the scored text"),
        (f"Mean KLD by the compressed model's entropy{of}", "by_entropy", "entropy, nats"),
    ):
        yield _figure(title, svg.columns(title, *_bars(made[key]), x_name, "nats (± 1 standard error)"))
    title = f"Mean KLD by class of the scored token{of}"
    yield _figure(title, svg.rows(title, *_bars(made["by_class"]), "nats (± 1 standard error)"))
    layers = made["layers"]
    if "skipped" in layers:
        return
    numbers = [row["layer"] for row in layers["distances"]]
    yield _figure(
        "Relative error of each layer",
        svg.lines(
            "Relative error by layer",
            [
                svg.Series(
                    "of what stands after the layer", numbers, [row["accumulated"] for row in layers["distances"]]
                ),
                svg.Series(
                    "of what the layer adds, given the reference's input",
                    numbers,
                    [row["alone"] for row in layers["distances"]],
                ),
            ],
            "layer",
            "|c − r| / |r|",
        ),
    )
    for kind, title in (("layer", "KLD won back by restoring one layer"), ("", "KLD won back by restoring one sort")):
        restored = [row for row in layers["restored"] if (row["kind"] == "layer") == (kind == "layer")]
        if not restored:
            continue
        names = [row["name"].removeprefix("layer ") for row in restored]
        values = [row["won_nats"] or 0.0 for row in restored]
        errors = [row["won_se_by_request"] for row in restored]
        plot = (
            svg.columns(title, names, values, errors, "layer", "nats (± 1 standard error)")
            if kind
            else svg.rows(title, names, values, errors, "nats (± 1 standard error)")
        )
        yield _figure(title, plot)


def _bars(rows: Sequence[Row]) -> tuple[list[str], list[float], list[float | None]]:
    return (
        [row["name"] for row in rows],
        [row["kld"]["value"] or 0.0 for row in rows],
        [row["kld"]["se_by_request"] for row in rows],
    )


def _figure(caption: str, plot: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{plot}</figure>"


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 0) -> str:
    """The first cell of a row is its name; the last `texts` cells are running text."""
    first_text = len(heads) - texts
    kinds = ("",) * first_text + (' class="text"',) * texts
    head = "".join(f'<th scope="col"{kind}>{escape(h)}</th>' for kind, h in zip(kinds, heads, strict=True))
    body = ""
    for first, *others in rows:
        numbers, words = others[: len(others) - texts], others[len(others) - texts :]
        cells = "".join(f"<td>{escape(c)}</td>" for c in numbers)
        cells += "".join(f'<td class="text">{escape(w)}</td>' for w in words)
        body += f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>'
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _statistics(title: str, rows: Sequence[Row]) -> str:
    return _table(
        title,
        ("", "value", "±", ""),
        [
            (row["name"], number(row["value"], row["unit"]), error(row), "" if row["of"] == "exact" else row["of"])
            for row in rows
        ],
    )


def _trajectory(curves: Sequence[Row]) -> str:
    return _table(
        "Tokens, with 95 % intervals by request",
        ("", "half-life", "equal tokens from the start", "of"),
        [
            (
                f"{curve['name']}{_extent(curve)}",
                interval(curve["half_life"], curve["half_life_ci95"], f"> {curve['positions'][-1]}"),
                interval(curve["prefix"], curve["prefix_ci95"], UNKNOWN),
                str(curve["horizon"]),
            )
            for curve in curves
        ],
    )


def _worst(caption: str, rows: Sequence[Row], names: Sequence[str]) -> str:
    texts = [name for name in ("before", "text") if rows and name in rows[0]]
    return _table(
        caption,
        (*names, *texts),
        [[*(cell(row[name]) for name in names), *(row[t] for t in texts)] for row in rows],
        len(texts),
    )


def _layers(layers: Row) -> str:
    if "skipped" in layers:
        return f"<p>Left out: {escape(layers['skipped'])}.</p>"
    best = sorted(layers["restored"], key=lambda row: -(row["won_nats"] or 0.0))
    return _table(
        f"What restoring wins back, best first; on {layers['tokens']} tokens of {layers['requests']} prompts, "
        f"mean KLD {layers['mean_kld']:.4f} nats",
        ("restored", "won back, nats", "± by request", "share"),
        [
            (row["name"], f"{row['won_nats']:+.4f}", cell(row["won_se_by_request"]), percent(row["won_share"]))
            for row in best
        ],
    )
