"""The report's figures against plain numpy, and the page that shows them."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from hemostat import cli
from hemostat.doctor import html, svg, terminal
from hemostat.doctor.pair import ALWAYS, EXACT, FLOOR, Scored, pack, unpack
from hemostat.doctor.report import tables

VOID = {"meta", "link", "br", "hr", "img", "input"}


@pytest.fixture(scope="module")
def scored() -> list[Scored]:
    rng = np.random.default_rng(0)
    found = []
    for index, tokens in enumerate((1, 3, 40, 17, 70)):
        figures = {name: rng.gamma(1.0, 0.3, tokens) for name in EXACT}
        figures["tv"] = rng.random(tokens) * 0.5
        figures["logp_r"], figures["logp_c"] = -rng.gamma(2.0, 1.0, (2, tokens))
        figures["same_top"] = (rng.random(tokens) < 0.7).astype(float)
        figures[FLOOR] = np.full(tokens, 0.001)
        found.append(Scored(index, rng.integers(0, 7, tokens).astype(np.int32), figures))
    return found


@pytest.fixture(scope="module")
def report(scored: list[Scored]) -> dict[str, Any]:
    classes = dict(enumerate(("word start", "digits", "punctuation", "whitespace", "special", "digits", "word start")))
    side = {"name": "<b>model</b> & co", "digest": "0" * 32, "dtype": "bfloat16"}
    layers = {
        "tokens": 20,
        "requests": 2,
        "mean_kld": 0.5,
        "mean_kld_se_by_request": None,
        "distances": [{"layer": n, "accumulated": 0.1 * n, "cosine": 0.9, "alone": 0.05} for n in range(4)],
        "restored": [
            {"name": f"layer {n}", "kind": "layer", "mean_kld": 0.4, "won_nats": 0.1 * (n - 1),
             "won_se_by_request": 0.01, "won_share": 0.2}
            for n in range(3)
        ]
        + [{"name": "every mlp", "kind": "kind", "mean_kld": 0.4, "won_nats": 0.1, "won_se_by_request": None,
            "won_share": None}],
    }  # fmt: skip
    return {
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
        **tables(scored, classes, [3, 4, 5, 6, 7], 4, dict.fromkeys(range(5), "sampled")),
        "layers": layers,
    }


def value(report: dict[str, Any], table: str, name: str) -> float:
    return next(row["value"] for row in report[table] if row["name"] == name)


def test_table_matches_llama_cpp(scored: list[Scored], report: dict[str, Any]) -> None:
    whole = {name: np.concatenate([one.figures[name] for one in scored]) for name in (*EXACT, *ALWAYS)}
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
    chosen = np.concatenate([one.figures["kl_rc"][4:8] for one in scored])
    assert by_position["4–7"]["kld"]["value"] == pytest.approx(chosen.mean())
    assert by_position["4–7"]["requests"] == 3
    assert sum(report["histogram"]["share"]) == pytest.approx(1.0)
    worst = report["worst_tokens"][0]
    one = scored[worst["prompt"]]
    assert worst["kld"] == max(float(o.figures["kl_rc"].max()) for o in scored)
    assert one.figures["kl_rc"][worst["position"]] == worst["kld"]
    assert (worst["line"], worst["token_id"]) == (worst["prompt"] + 3, int(one.output[worst["position"]]))
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
        assert all(terminal.format_cell(row[name]) in shown for name in names)
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
    assert checker.images == 8
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


def test_contrast_in_both_schemes(report: dict[str, Any]) -> None:
    """WCAG 2.2: 7 to 1 for text (AAA), 3 to 1 for graphics."""
    style = html.render(report).partition("<style>")[2].partition("</style>")[0]
    light, dark = (dict(re.findall(r"--(\w+): #(\w+);", part)) for part in style.split("@media")[:2])
    for colours in (light, dark):
        for name, least in (("ink", 7), ("quiet", 7), ("s0", 3), ("s1", 3), ("s2", 3), ("s3", 3)):
            for under in ("paper", "card"):
                high, low = sorted((luminance(colours[name]), luminance(colours[under])), reverse=True)
                assert (high + 0.05) / (low + 0.05) >= least, (name, under)


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [1e-9, 3.0], [-2.0, 5.0], [-1.0, -3.0], [1e6]])
def test_plots_of_extreme_values_stay_inside_the_picture(values: list[float]) -> None:
    labels = [str(n) for n in range(len(values))]
    errors = [None, *[0.1] * (len(values) - 1)]
    for plot in (
        svg.bar_chart("t", labels, values, errors, "x", "y"),
        svg.horizontal_bar_chart("t", labels, values, errors, "x"),
        svg.line_chart("t", [svg.Series("s", [1, *range(2, len(values) + 1)], [abs(v) for v in values])], "x", "y"),
    ):
        root = ElementTree.fromstring(plot)
        box = [float(n) for n in root.attrib["viewBox"].split()]
        for mark in root.iter():
            for name, most in (("x", box[2]), ("y", box[3]), ("x1", box[2]), ("y1", box[3]), ("x2", box[2])):
                assert -1.0 <= float(mark.attrib.get(name, 0.0)) <= most + 1.0


def test_chromium_reports_no_error(report: dict[str, Any], tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here: the page was checked by parsers only")
    page = tmp_path / "page.html"
    page.write_text(html.render(report), encoding="utf-8")
    ran = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--enable-logging=stderr", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "Same top p" in ran.stdout
    assert "CONSOLE" not in ran.stderr


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


def test_missing_torch_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from hemostat.doctor import main as module

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(module.DoctorError, match=r"not installed: torch, transformers; pip install 'hemostat\[transf"):
        module.open_pair(module.DoctorOptions("a/b", "c/d"))


def test_html_without_jinja_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "jinja2" else found(name))
    assert cli.main(["doctor", "http://x:1", "http://x:2", "--html", str(tmp_path / "page.html")]) == 2
    error = capsys.readouterr().err
    assert "hemostat[report]" in error
    assert error.count("\n") == 1
