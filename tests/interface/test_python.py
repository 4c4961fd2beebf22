"""The public interface: what it is, that its examples are right, and that importing it costs nothing."""

from __future__ import annotations

import ast
import doctest
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
import transformers
from tests.support.captures import capture
from tests.support.tiny_checkpoints import VOCAB, make_pair

import hemostat
from hemostat.interface.reports import wait
from hemostat.scoring.spool.columns import to_rows
from hemostat.scoring.spool.segments import write_segment
from hemostat.scoring.spool.spooled import Spooled
from hemostat_calibration.errors import HemostatError, InvalidArgumentError

PUBLIC = ["ConfidenceSequence", "DependenceEstimate", "Report", "__version__", "compare", "score"]
ROOT = Path(__file__).resolve().parents[2]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
TOKENS, K = 12, 20


def test_nothing_else_is_public() -> None:
    assert hemostat.__all__ == PUBLIC == dir(hemostat)
    stub = ast.parse(Path(hemostat.__file__).with_suffix(".pyi").read_text())
    typed = [name.asname for node in stub.body if isinstance(node, ast.ImportFrom) for name in node.names]
    assert sorted([*filter(None, typed), "__version__"]) == sorted(PUBLIC)
    for name in PUBLIC:
        assert getattr(hemostat, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hemostat.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_the_import_loads_nothing() -> None:
    code = "import hemostat, sys; print(sorted(m for m in sys.modules if m.split('.')[0] in ('numpy', 'hemostat')))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['hemostat']"


@pytest.mark.parametrize("name", ["streaming", "reports", "comparison"])
def test_examples_of_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"hemostat.interface.{name}"), optionflags=OPTIONS)
    assert result.attempted > 3
    assert result.failed == 0


def spool_of_a_tiny_model(folder: Path) -> None:
    """Makes a spool of 8 captures of a compressed model, and the folder of its reference."""
    pair = make_pair(folder)
    pair.reference.rename(folder / "my-model")
    model = transformers.AutoModelForCausalLM.from_pretrained(pair.compressed).eval()
    generator, made = np.random.default_rng(0), []
    for number in range(8):
        ids = generator.integers(0, VOCAB, 4 + TOKENS)
        with torch.no_grad():
            logprobs = model(torch.tensor(ids[None])).logits[0, 3:-1].log_softmax(-1).float().numpy()
        likeliest = np.argsort(-logprobs, axis=1, kind="stable")[:, : K + 1].astype("<i4")
        output = likeliest[:, 0]
        ids[4:] = output
        given = np.take_along_axis(logprobs, likeliest, 1).astype("<f4")
        one = capture(
            str(number),
            top_k=K,
            prompt_token_ids=ids[:4].astype("<i4").tobytes(),
            output_token_ids=output.tobytes(),
            candidate_ids=likeliest.tobytes(),
            candidate_logprobs=given.tobytes(),
            emitted_logprobs=given[:, 0].tobytes(),
        )
        made.append(Spooled(msgspec.structs.replace(one, kind="chat text sampled"), 1_700_000_000.0 + number))
    (folder / "spool").mkdir()
    write_segment(folder / "spool/captures-1700000000000-00000000.parquet", to_rows(made), None)


def test_examples_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool_of_a_tiny_model(tmp_path)
    monkeypatch.chdir(tmp_path)
    result = doctest.testfile(str(ROOT / "docs/python.md"), module_relative=False, optionflags=OPTIONS)
    assert result.attempted > 15
    assert result.failed == 0


WITHOUT_EXTRAS = """
import doctest, json, sys
for name in ("pyarrow", "cryptography", "torch", "transformers"):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError

failed = {}

class Runner(doctest.DocTestRunner):
    def report_unexpected_exception(self, out, test, example, error):
        failed[example.source] = error[0].__name__

    def report_failure(self, out, test, example, got):
        failed[example.source] = "another output"

test = doctest.DocTestParser().get_doctest(open(sys.argv[1]).read(), {}, "python.md", None, 0)
attempted = Runner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(test).attempted
print(json.dumps([attempted, failed]))
"""


def test_the_page_says_what_needs_an_extra() -> None:
    """`compare` and the estimators need the package alone; the others name the packages that are missing."""
    command = [sys.executable, "-c", WITHOUT_EXTRAS, str(ROOT / "docs/python.md")]
    attempted, failed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert attempted > 15
    needs = [source for source, error in failed.items() if error == "MissingPackageError"]
    assert [source.split("(")[0] for source in needs] == [
        "report.to_arrow",
        "report = hemostat.score",
        "hemostat.Report.read",
    ]
    # These two show the report that `score` returns.
    assert [source for source in failed if source not in needs] == ["report\n", list(failed)[-1]]


async def test_it_works_in_a_notebook_whose_loop_runs() -> None:
    async def work() -> int:
        return 7

    assert wait(work()) == 7


def test_a_report_is_shown_as_tables() -> None:
    logprobs = np.log([[0.5, 0.4, 0.1]])
    shown = hemostat.compare(logprobs, logprobs)._repr_html_()
    assert shown.count("<table>") == 1
    assert "<td>total variation</td><td>0</td>" in shown
    report = hemostat.compare(logprobs, logprobs)
    with pytest.raises(KeyError, match="total_variation"):
        report["nothing"]


def test_a_report_as_a_data_frame() -> None:
    pytest.importorskip("pandas", reason="pandas is not installed")
    logprobs = np.log([[0.5, 0.4, 0.1]])
    frame = hemostat.compare(logprobs, logprobs).to_pandas()
    assert list(frame.columns) == ["group", "figure", "mean", "low", "high", "bound", "requests", "tokens"]


def test_a_plot() -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    matplotlib.use("Agg")
    logprobs = np.log([[0.5, 0.4, 0.1]])
    axes = hemostat.compare(logprobs, logprobs).plot("total_variation")
    assert [text.get_text() for text in axes.get_yticklabels()] == ["all"]


def test_a_plot_has_each_group(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, object] = {}
    axes = SimpleNamespace(
        errorbar=lambda means, places, xerr, fmt, capsize: drawn.update(means=means, errors=xerr),
        set_yticks=lambda places, names: drawn.update(names=names),
        invert_yaxis=lambda: None,
        set_xlabel=lambda text: drawn.update(label=text),
    )
    pyplot = SimpleNamespace(subplots=lambda: (None, axes))
    monkeypatch.setitem(sys.modules, "matplotlib", SimpleNamespace(pyplot=pyplot, __spec__=object()))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", pyplot)
    logprobs = np.log([[0.5, 0.4, 0.1]])
    hemostat.compare(logprobs, logprobs).plot("total_variation")
    assert drawn["names"] == ["all"]
    assert drawn["label"] == "total variation"


@pytest.mark.parametrize(
    ("reference", "compressed", "more", "says"),
    [
        ([[0.5, 0.5]], [[0.5, 0.5]], {}, "reference_logprobs: the probabilities of position 0 add up to"),
        (np.log([[0.5, 0.5]]), [[np.nan, 0.0]], {}, "compressed_logprobs: the probabilities of position 0"),
        (np.log([[0.5, 0.5]]), np.log([[0.5, 0.4, 0.1]]), {}, "the same vocabulary"),
        (np.log([[[0.5, 0.5]]] * 2), np.log([[[0.5, 0.5]]]), {}, "give as many"),
        (np.log([[0.5, 0.5]]), np.log([[0.5, 0.5]]), {"output_ids": [2]}, "1 ids below 2"),
        (np.log([[0.5, 0.5]]), np.log([[0.5, 0.5]]), {"clients": ["a", "b"]}, "clients has 2 entries"),
        ("text", np.log([[0.5, 0.5]]), {}, "reference_logprobs: give numbers"),
        (np.log([0.5, 0.5]), np.log([0.5, 0.5]), {}, "the shape"),
    ],
)
def test_what_cannot_be_compared_is_named(reference: object, compressed: object, more: object, says: str) -> None:
    with pytest.raises(InvalidArgumentError, match=says):
        hemostat.compare(reference, compressed, **more)  # type: ignore[arg-type]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(HemostatError, match="there is no folder"):
        hemostat.score(tmp_path / "none", "my-model")
