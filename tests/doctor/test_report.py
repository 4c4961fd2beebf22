"""The report's figures against plain numpy, and the page that shows them."""

from __future__ import annotations

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
def made(scored: list[Scored]) -> dict[str, Any]:
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


def value(made: dict[str, Any], table: str, name: str) -> float:
    return next(row["value"] for row in made[table] if row["name"] == name)


def test_llama_cpp_s_table(scored: list[Scored], made: dict[str, Any]) -> None:
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
        assert value(made, table, name) == pytest.approx(expected), name
    # By token, the errors are llama.cpp's own.
    row = next(row for row in made["perplexity"] if row["name"] == "Mean PPL(Q)")
    assert row["se_by_token"] == pytest.approx(np.exp(q.mean()) * q.std() / np.sqrt(len(q) - 1))
    row = next(row for row in made["token_probability"] if row["name"] == "Same top p")
    share = whole["same_top"].mean()
    assert row["se_by_token"] == pytest.approx(100 * np.sqrt(share * (1 - share) / (len(q) - 1)))


def test_groups_and_worst(scored: list[Scored], made: dict[str, Any]) -> None:
    by_position = {row["name"]: row for row in made["by_position"]}
    assert list(by_position) == ["0", "1", "2–3", "4–7", "8–15", "16–31", "32–63", "64–127"]
    chosen = np.concatenate([one.figures["kl_rc"][4:8] for one in scored])
    assert by_position["4–7"]["kld"]["value"] == pytest.approx(chosen.mean())
    assert by_position["4–7"]["requests"] == 3
    assert sum(made["histogram"]["share"]) == pytest.approx(1.0)
    worst = made["worst_tokens"][0]
    one = scored[worst["prompt"]]
    assert worst["kld"] == max(float(o.figures["kl_rc"].max()) for o in scored)
    assert one.figures["kl_rc"][worst["position"]] == worst["kld"]
    assert (worst["line"], worst["token_id"]) == (worst["prompt"] + 3, int(one.output[worst["position"]]))
    assert len(made["worst_tokens"]) == len(made["worst_prompts"]) == 4
    assert made["worst_prompts"][0]["mean_kld"] == max(float(o.figures["kl_rc"].mean()) for o in scored)


def test_what_is_stored_comes_back(scored: list[Scored]) -> None:
    again = unpack(pack(scored))
    assert pack(again) == pack(scored)
    assert all((a.output == b.output).all() and a.index == b.index for a, b in zip(scored, again, strict=True))


def test_json_has_no_nan(made: dict[str, Any]) -> None:
    json.dumps(made, allow_nan=False)


def test_the_terminal_shows_it(made: dict[str, Any]) -> None:
    console = Console(width=100, file=io.StringIO())
    console.print(terminal.picture(made))
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
    """Every tag is closed in its turn; ids are unique; nothing is fetched or run."""

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


def test_on_a_narrow_terminal_texts_wrap_and_figures_stay_whole(made: dict[str, Any]) -> None:
    tokens = [{**row, "before": "a" * 60, "text": "ends here"} for row in made["worst_tokens"]]
    prompts = [{**row, "text": "what the user said, " * 5} for row in made["worst_prompts"]]
    console = Console(width=80, file=io.StringIO())
    console.print(terminal.picture(made | {"worst_tokens": tokens, "worst_prompts": prompts}))
    told = console.file.getvalue()  # type: ignore[attr-defined]
    for row, names in ((tokens[0], ("kld", "p_base", "p_q")), (prompts[0], ("mean_kld", "tv", "ln_ppl_ratio"))):
        assert all(terminal.cell(row[name]) in told for name in names)
    assert "a⟨ends" in told
    assert max(map(len, told.splitlines())) <= 80


def test_the_page_is_sound_and_fetches_nothing(made: dict[str, Any]) -> None:
    page = html.page(made)
    checker = _Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert checker.images == 8
    assert len(set(checker.ids)) == len(checker.ids)
    assert set(checker.pointed) <= set(checker.ids)
    assert "<b>model</b>" not in page
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


def test_contrast_in_both_schemes() -> None:
    """WCAG 2.2: 7 to 1 for text (AAA), 3 to 1 for graphics."""
    light, dark = (dict(re.findall(r"--(\w+): #(\w+);", part)) for part in html.STYLE.split("@media")[:2])
    for colours in (light, dark):
        for name, least in (("ink", 7), ("quiet", 7), ("s0", 3), ("s1", 3), ("s2", 3), ("s3", 3)):
            for under in ("paper", "card"):
                high, low = sorted((luminance(colours[name]), luminance(colours[under])), reverse=True)
                assert (high + 0.05) / (low + 0.05) >= least, (name, under)


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [1e-9, 3.0], [-2.0, 5.0], [-1.0, -3.0], [1e6]])
def test_plots_stand_any_values(values: list[float]) -> None:
    labels = [str(n) for n in range(len(values))]
    errors = [None, *[0.1] * (len(values) - 1)]
    for plot in (
        svg.columns("t", labels, values, errors, "x", "y"),
        svg.rows("t", labels, values, errors, "x"),
        svg.lines("t", [svg.Series("s", [1, *range(2, len(values) + 1)], [abs(v) for v in values])], "x", "y"),
    ):
        root = ElementTree.fromstring(plot)
        box = [float(n) for n in root.attrib["viewBox"].split()]
        for mark in root.iter():
            for name, most in (("x", box[2]), ("y", box[3]), ("x1", box[2]), ("y1", box[3]), ("x2", box[2])):
                assert -1.0 <= float(mark.attrib.get(name, 0.0)) <= most + 1.0


def test_chromium_has_nothing_to_complain_about(made: dict[str, Any], tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here: the page was checked by parsers only")
    page = tmp_path / "page.html"
    page.write_text(html.page(made), encoding="utf-8")
    ran = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--enable-logging=stderr", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "Same top p" in ran.stdout
    assert "CONSOLE" not in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["/nowhere/a", "/nowhere/b"], "REFERENCE: there is no folder /nowhere/a"),
        (["http://x:1", "/nowhere/b"], "must be of one kind"),
        ([".", "."], "REFERENCE: . is not a transformers checkpoint: it has no config.json"),
        (["a/b", "c/d", "--json", "/nowhere/x.json"], "--json: /nowhere/x.json cannot be written"),
        (["a/b", "c/d", "--prompts", "/nowhere/p"], "--prompts: /nowhere/p cannot be read"),
        (["a/b", "c/d", "--tokens", "0"], "'0' is not a whole number from 1 on"),
        (["a/b", "c/d", "--greedy", "--given"], "not allowed with"),
        (["a/b"], "required: COMPRESSED"),
    ],
)
def test_bad_command_lines_are_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_without_torch_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from hemostat.doctor import main as module

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(module.DoctorError, match=r"not installed: torch, transformers; pip install 'hemostat\[transf"):
        module.open_pair(module.DoctorOptions("a/b", "c/d"))
