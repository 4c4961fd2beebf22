"""The report's figures against plain numpy, and the page that shows them."""

from __future__ import annotations

import importlib.util
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console
from tests.support.pages import assert_marks_inside, chromium_markup

from hemostat import cli
from hemostat.report import svg
from hemostat.report.formats import format_cell
from hemostat.report.heat_map import TEXT_OPACITY, heat_map
from hemostat_lab.doctor import html, terminal
from hemostat_lab.doctor.causes.findings import findings
from hemostat_lab.doctor.pair import ALWAYS, EXACT, FLOOR, Scored, pack, unpack
from hemostat_lab.doctor.report import PromptKind, tables

VOID = {"meta", "link", "br", "hr", "img", "input"}


@pytest.fixture(scope="module")
def scored() -> list[Scored]:
    rng = np.random.default_rng(0)
    result = []
    for index, tokens in enumerate((1, 3, 40, 17, 70)):
        figures = {name: rng.gamma(1.0, 0.3, tokens) for name in EXACT}
        figures["tv"] = rng.random(tokens) * 0.5
        figures["logp_r"], figures["logp_c"] = -rng.gamma(2.0, 1.0, (2, tokens))
        figures["same_top"] = (rng.random(tokens) < 0.7).astype(float)
        figures[FLOOR] = np.full(tokens, 0.001)
        result.append(Scored(index, rng.integers(0, 7, tokens).astype(np.int32), figures))
    return result


@pytest.fixture(scope="module")
def report(scored: list[Scored]) -> dict[str, Any]:
    classes = dict(enumerate(("word start", "digits", "punctuation", "whitespace", "special", "digits", "word start")))
    side = {"name": "<b>model</b> & co", "digest": "0" * 32, "dtype": "bfloat16"}
    layers = {
        "tokens": 20,
        "requests": 2,
        "mean_kld": 0.5,
        "mean_kld_se_by_request": None,
        "noise_floor": 0.001,
        "distances": [{"layer": n, "accumulated": 0.1 * n, "cosine": 0.9, "alone": 0.05} for n in range(4)],
        "restored": [
            {"name": f"layer {n}", "kind": "layer", "mean_kld": 0.4, "won_nats": 0.1 * (n - 1),
             "won_se_by_request": 0.01, "won_share": 0.2, "alone_nats": 0.05 * n, "alone_se_by_request": 0.01}
            for n in range(3)
        ]
        + [{"name": "every mlp", "kind": "kind", "mean_kld": 0.4, "won_nats": 0.1, "won_se_by_request": None,
            "won_share": None, "alone_nats": 0.2, "alone_se_by_request": None}],
        "additivity": {"parts": 3, "sum_alone": 0.15, "sum_alone_se_by_request": 0.01, "excess": 0.35,
                       "excess_se_by_request": 0.01},
        "modules": {"tokens": 5, "requests": 2, "not_measured": 0, "rows": [
            {"layer": n, "module": name, "alone_nats": 0.01 * n, "alone_se_by_request": 0.001}
            for n in range(3) for name in ("self_attn.q_proj", "mlp.<up>")
        ]},
    }  # fmt: skip
    outliers = {
        "requests": 2,
        "positions": 30,
        "modules": [
            {"layer": 0, "module": "mlp.<up>", "channel_ratio": 30.0, "channel": 3, "crest": 9.0,
             "crest_se_by_request": 0.5, "crest_max": 20.0, "int8_error": 0.02, "weight_error": 0.1,
             "inputs_share": 0.3, "input": 3, "outputs_share": 0.1, "output": 1},
            {"layer": 1, "module": "mlp.<up>"},
        ],
        "sinks": [{"layer": n, "first_norm_ratio": 50.0, "first_norm_ratio_se_by_request": 2.0,
                   "first_attention": 0.4, "first_attention_se_by_request": 0.1} for n in range(4)],
    }  # fmt: skip
    chosen = {"reference": {"experts": 3, "first": [0, 4, 5]}, "compressed": {"experts": 0, "first": []}}
    routing = {
        "tokens": 20, "requests": 5, "mean_kld": 0.4, "won_nats": 0.1, "won_se_by_request": 0.01,
        "layers": [{"layer": 0, "experts": 8, "per_token": 2, "positions": 40, "same": 0.75, "shared": 0.8, "loads": {},
                    "unreached": chosen}],
    }  # fmt: skip
    compared = {"bytes": 90, "predicted": 0.1, "mean_kld": 0.2, "mean_kld_se_by_request": 0.01,
                "more_than_prescribed": 0.05, "more_se_by_request": 0.01}  # fmt: skip
    prescription = {
        "target": "any", "budget": 100, "bytes": 90, "bits_per_weight": 4.2, "predicted": 0.1,
        "predicted_lower_bound": 0.09, "learned_requests": 3, "learned_positions": 60, "unreached": [], "tokens": 20,
        "requests": 2, "mean_kld": 0.15, "mean_kld_se_by_request": 0.01, "counts": {"4 bits, groups of 64": 8},
        "plan": {"layers": {f"model.layers.{n}.mlp.<up>": {"bits": 2 + n, "group_size": 64, "sparsity": 0.0,
                                                            "pattern": "unstructured"} for n in range(4)}},
        "compared": [compared | {"name": "prescribed"}, compared | {"name": "uniform 4 bits"},
                     compared | {"name": "COMPRESSED", "bytes": None, "predicted": None}],
    }  # fmt: skip
    kinds = {n: PromptKind(n % 2 == 0, 40 * n) for n in range(5)}
    report = {
        "schema": 1,
        "hemostat": "0",
        "reference": side,
        "compressed": side,
        "vocab_size": 7,
        "full_vocabulary": True,
        "top_k": None,
        "prompt_file": "p",
        "texts": {"sampled": 5},
        "seed": 0,
        "notes": ["a <note>"],
        **tables(scored, classes, [3, 4, 5, 6, 7], 4, dict.fromkeys(range(5), "sampled"), kinds),
        "layers": layers,
        "outliers": outliers,
        "routing": routing,
        "prescription": prescription,
    }
    return report | {"findings": findings(report)}


def value(report: dict[str, Any], table: str, name: str) -> float:
    return next(row["value"] for row in report[table] if row["name"] == name)


def test_table_matches_llama_cpp(scored: list[Scored], report: dict[str, Any]) -> None:
    whole = {name: np.concatenate([text.figures[name] for text in scored]) for name in (*EXACT, *ALWAYS)}
    q, base, kld = -whole["logp_c"], -whole["logp_r"], whole["kl_rc"]
    delta = 100 * (np.exp(-q) - np.exp(-base))
    for table, name, expected in (
        ("perplexity", "Mean PPL(Q)", np.exp(q.mean())),
        ("perplexity", "Mean PPL(base)", np.exp(base.mean())),
        ("perplexity", "Cor(ln(PPL(Q)), ln(PPL(base)))", 100 * np.corrcoef(q, base)[0, 1]),
        ("perplexity", "Mean ln(PPL(Q)/PPL(base))", (q - base).mean()),
        ("perplexity", "Mean PPL(Q)/PPL(base)", np.exp((q - base).mean())),
        ("perplexity", "Mean PPL(Q)-PPL(base)", np.exp(q.mean()) - np.exp(base.mean())),
        ("kl_divergence", "Mean    KLD", kld.mean()),
        ("kl_divergence", "Maximum KLD", kld.max()),
        ("kl_divergence", "99.9%   KLD", np.percentile(kld, 99.9)),
        ("kl_divergence", "90.0%   KLD", np.percentile(kld, 90)),
        ("kl_divergence", "Median  KLD", np.median(kld)),
        ("kl_divergence", " 5.0%   KLD", np.percentile(kld, 5)),
        ("kl_divergence", "Minimum KLD", kld.min()),
        ("token_probability", "Mean    Δp", delta.mean()),
        ("token_probability", "25.0%   Δp", np.percentile(delta, 25)),
        ("token_probability", "Minimum Δp", delta.min()),
        ("token_probability", "RMS Δp", np.sqrt((delta**2).mean())),
        ("token_probability", "Same top p", 100 * whole["same_top"].mean()),
        ("divergence", "KL(r‖c) above the floor", kld.mean() - 0.001),
        ("divergence", "entropy shift H(c) − H(r)", (whole["entropy_c"] - whole["entropy_r"]).mean()),
    ):
        assert value(report, table, name) == pytest.approx(expected), name
    # By token, the errors are llama.cpp's own.
    row = next(row for row in report["perplexity"] if row["name"] == "Mean PPL(Q)")
    assert row["se_by_token"] == pytest.approx(np.exp(q.mean()) * q.std() / np.sqrt(len(q) - 1))
    row = next(row for row in report["token_probability"] if row["name"] == "Same top p")
    share = whole["same_top"].mean()
    assert row["se_by_token"] == pytest.approx(100 * np.sqrt(share * (1 - share) / (len(q) - 1)))


def test_groups_and_worst_lists(scored: list[Scored], report: dict[str, Any]) -> None:
    by_position = {row["name"]: row for row in report["by_position"]}
    assert list(by_position) == ["0", "1", "2–3", "4–7", "8–15", "16–31", "32–63", "64–127"]
    chosen = np.concatenate([text.figures["kl_rc"][4:8] for text in scored])
    assert by_position["4–7"]["kld"]["value"] == pytest.approx(chosen.mean())
    assert by_position["4–7"]["requests"] == 3
    others = np.concatenate([np.delete(text.figures["kl_rc"], slice(4, 8)) for text in scored])
    assert by_position["4–7"]["excess"]["value"] == pytest.approx(chosen.mean() - others.mean())
    assert {row["name"] for row in report["by_form"]} == {"chat, sampled", "plain text, sampled"}
    assert [row["name"] for row in report["by_prompt_length"]] == ["1–31 tokens", "32–127 tokens", "128–511 tokens"]
    assert sum(report["histogram"]["share"]) == pytest.approx(1.0)
    worst = report["worst_tokens"][0]
    text = scored[worst["prompt"]]
    assert worst["kld"] == max(float(o.figures["kl_rc"].max()) for o in scored)
    assert text.figures["kl_rc"][worst["position"]] == worst["kld"]
    assert (worst["line"], worst["token_id"]) == (worst["prompt"] + 3, int(text.output[worst["position"]]))
    assert len(report["worst_tokens"]) == len(report["worst_prompts"]) == 4
    assert report["worst_prompts"][0]["mean_kld"] == max(float(o.figures["kl_rc"].mean()) for o in scored)


def test_pack_and_unpack_round_trip(scored: list[Scored]) -> None:
    again = unpack(pack(scored))
    assert pack(again) == pack(scored)
    assert all((a.output == b.output).all() and a.index == b.index for a, b in zip(scored, again, strict=True))


def test_json_has_no_nan(report: dict[str, Any]) -> None:
    json.dumps(report, allow_nan=False)


def test_terminal_shows_every_section(report: dict[str, Any]) -> None:
    console = Console(width=100, file=io.StringIO())
    console.print(terminal.render(report))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for name in (
        "Mean PPL(Q)/PPL(base)",
        "99.9%   KLD",
        "RMS Δp",
        "Same top p",
        "word start",
        "half-life",
        "every mlp",
        "Restore all but one",
        "uniform 4 bits",
    ):
        assert name in text
    assert "nan" not in text


class _Checker(HTMLParser):
    """Checks that tags are balanced and that the page neither loads nor runs anything; collects ids."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.pointed: list[str] = []
        self.images = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert tag not in ("script", "iframe", "img", "link", "object")
        assert not {"src", "href", "onload"} & set(given)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in given:
            self.ids.append(given["id"] or "")
        if tag == "svg":
            self.images += 1
            assert given["role"] == "img"
            self.pointed += (given["aria-labelledby"] or "").split()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_narrow_terminal_wraps_texts_and_not_numbers(report: dict[str, Any]) -> None:
    tokens = [{**row, "before": "a" * 60, "text": "ends here"} for row in report["worst_tokens"]]
    prompts = [{**row, "text": "what the user said, " * 5} for row in report["worst_prompts"]]
    console = Console(width=80, file=io.StringIO())
    console.print(terminal.render(report | {"worst_tokens": tokens, "worst_prompts": prompts}))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for row, names in ((tokens[0], ("kld", "p_base", "p_q")), (prompts[0], ("mean_kld", "tv", "ln_ppl_ratio"))):
        assert all(format_cell(row[name]) in shown for name in names)
    assert "a⟨ends" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_page_is_valid_html_escapes_texts_and_loads_nothing(report: dict[str, Any]) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    tokens = [{**row, "before": hostile, "text": "</td>"} for row in report["worst_tokens"]]
    prompts = [{**row, "text": hostile} for row in report["worst_prompts"]]
    page = html.render(report | {"worst_tokens": tokens, "worst_prompts": prompts})
    checker = _Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert checker.images == 12
    assert "mlp.&lt;up&gt;" in page
    assert "mlp.<up>" not in page
    assert len(set(checker.ids)) == len(checker.ids)
    assert set(checker.pointed) <= set(checker.ids)
    assert "<b>model</b>" not in page
    assert "a &lt;note&gt;" in page
    assert "<img src=x" not in page
    assert page.count("&lt;img src=x onerror=alert(1)&gt;") >= 2
    assert "&lt;b&gt;model&lt;/b&gt; &amp; co" in page
    assert "http" not in page.replace("http-equiv", "")
    assert "nan" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL).lower()
    for plot in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        root = ElementTree.fromstring(plot)
        assert [child.tag for child in root[:2]] == ["title", "desc"]
        assert all(child.text for child in root[:2])


def luminance(colour: str) -> float:
    digits = colour if len(colour) == 6 else "".join(2 * c for c in colour)
    parts = [int(digits[n : n + 2], 16) / 255 for n in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def opacity_contrast(colours: dict[str, str]) -> float:
    """Of the text of a heat map, which is quiet, on the strongest cell behind text."""
    full = {name: c if len(c) == 6 else "".join(2 * x for x in c) for name, c in colours.items()}
    parts = [[int(full[name][n : n + 2], 16) for n in (0, 2, 4)] for name in ("s0", "paper")]
    mixed = "".join(f"{round(TEXT_OPACITY * a + (1 - TEXT_OPACITY) * b):02x}" for a, b in zip(*parts, strict=True))
    high, low = sorted((luminance(full["quiet"]), luminance(mixed)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_in_both_schemes(report: dict[str, Any]) -> None:
    """WCAG 2.2: 7 to 1 for text (AAA), 3 to 1 for graphics."""
    style = html.render(report).partition("<style>")[2].partition("</style>")[0]
    light, dark = (dict(re.findall(r"--(\w+): #(\w+);", part)) for part in style.split("@media")[:2])
    for colours in (light, dark):
        assert opacity_contrast(colours) >= 4.5
        for name, least in (("ink", 7), ("quiet", 7), ("s0", 3), ("s1", 3), ("s2", 3), ("s3", 3)):
            for under in ("paper", "card"):
                high, low = sorted((luminance(colours[name]), luminance(colours[under])), reverse=True)
                assert (high + 0.05) / (low + 0.05) >= least, (name, under)


def test_contrast_of_groups_against_a_jackknife(scored: list[Scored], report: dict[str, Any]) -> None:
    """The standard error by request of a difference of means, without the linearisation."""
    inside = [np.isin(np.arange(len(text.output)), range(4, 8)) for text in scored]
    values = [text.figures["kl_rc"] for text in scored]

    def difference(kept: list[int]) -> float:
        x, chosen = np.concatenate([values[n] for n in kept]), np.concatenate([inside[n] for n in kept])
        return float(x[chosen].mean() - x[~chosen].mean())

    left_out = np.array([difference([n for n in range(5) if n != out]) for out in range(5)])
    jackknife = np.sqrt(4 / 5 * ((left_out - left_out.mean()) ** 2).sum())
    row = next(row for row in report["by_position"] if row["name"] == "4–7")
    assert row["excess"]["se_by_request"] == pytest.approx(jackknife, rel=0.5)


def test_heat_map_is_monotone_and_escapes() -> None:
    rows, columns = ["a<b"], [str(n) for n in range(9)]
    values = {("a<b", column): 2.0 ** -int(column) for column in columns[:8]}
    tooltips = {cell: f"{cell[0]} {value}" for cell, value in values.items()}
    root = ElementTree.fromstring(heat_map("t", rows, columns, values, "layer", "nats", tooltips))
    cells = [mark for mark in root if mark.get("class") == "heat" and len(mark)]
    opacity = [float(mark.attrib["fill-opacity"]) for mark in cells]
    assert len(cells) == 8
    assert opacity == sorted(opacity, reverse=True)
    assert opacity[0] == 1.0
    assert opacity[0] > opacity[1] > opacity[5] > 0.0
    assert len({mark.attrib["x"] for mark in cells}) == 8
    for extreme in ({}, {("a<b", "0"): 0.0}, {("a<b", "0"): -1.0}, {("a<b", "0"): float("inf")}):
        plot = heat_map("t", rows, columns, extreme, "layer", "nats", dict.fromkeys(extreme, ""))
        ElementTree.fromstring(plot)
        assert "nan" not in plot


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [1e-9, 3.0], [-2.0, 5.0], [-1.0, -3.0], [1e6]])
def test_plots_of_extreme_values_stay_inside_the_picture(values: list[float]) -> None:
    labels = [str(n) for n in range(len(values))]
    errors = [None, *[0.1] * (len(values) - 1)]
    for plot in (
        svg.bar_chart("t", labels, values, errors, "x", "y"),
        svg.horizontal_bar_chart("t", labels, values, errors, "x"),
        svg.line_chart("t", [svg.Series("s", [1, *range(2, len(values) + 1)], [abs(v) for v in values])], "x", "y"),
    ):
        assert_marks_inside(ElementTree.fromstring(plot))


def test_chromium_reports_no_error(report: dict[str, Any], tmp_path: Path) -> None:
    shown = chromium_markup(html.render(report), tmp_path)
    for text in ("Same top p", "Causes", "Prescription", "Bits of each linear layer"):
        assert text in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere/a", "/nowhere/b"], "REFERENCE: there is no folder /nowhere/a"),
        (["http://x:1", "/nowhere/b"], "must be of the same kind"),
        ([".", "."], "REFERENCE: . is not a transformers checkpoint: it has no config.json"),
        (["a/b", "c/d", "--json", "/nowhere/x.json"], "--json: /nowhere/x.json cannot be written"),
        (["a/b", "c/d", "--prompts", "/nowhere/p"], "--prompts: /nowhere/p cannot be read"),
        (["a/b", "c/d", "--tokens", "0"], "'0' is not a positive integer"),
        (["a/b", "c/d", "--greedy", "--given"], "not allowed with"),
        (["a/b"], "required: COMPRESSED"),
    ],
)
def test_bad_command_line_is_one_line_of_error(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_missing_torch_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from hemostat_lab.doctor import main as module

    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: find(name) if name == "hemostat_lab" else None)
    with pytest.raises(module.DoctorError, match=r"not installed: torch, transformers, .*pip install .*'torch<"):
        module.open_pair(module.DoctorOptions("a/b", "c/d"))


def test_html_without_jinja_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    result = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "jinja2" else result(name))
    assert cli.main(["doctor", "http://x:1", "http://x:2", "--html", str(tmp_path / "page.html")]) == 2
    error = capsys.readouterr().err
    assert "pip install 'jinja2<" in error
    assert error.count("\n") == 1
