"""`hemostat compress --scheme prune`, `--repair` and `--compressed`, from the command line, on texts of a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.adapter_models import random_texts, save, tiny_model

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

from hemostat.cli import main
from hemostat_lab.models.checkpoint_folders import REPORT, is_complete


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """SOURCE, and where the texts are."""
    folder = tmp_path_factory.mktemp("command")
    save(tiny_model(hidden_size=64, intermediate_size=96, num_hidden_layers=2), folder / "source")
    lines = [
        json.dumps({"prompt_token_ids": text.prompt.tolist(), "output_token_ids": text.output.tolist()})
        for text in random_texts(40)
    ]
    (folder / "records.jsonl").write_text("\n".join(lines))
    return [str(folder / "source"), str(folder / "records.jsonl")]


def test_prune_and_repair(given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, records = given
    out, work = tmp_path / "out", str(tmp_path / "work")
    common = ["--records", records, "--work", work]
    pruning = ["--scheme", "prune", "--sparsity", "0.5", "--pattern", "2:4"]
    assert main(["compress", source, str(out), *pruning, *common]) == 0
    printed = capsys.readouterr().out
    assert "score kept" in printed
    assert "model.layers.1 " in printed
    report = json.loads((out / REPORT).read_text())
    assert report["settings"]["pattern"] == "2:4"
    repaired = tmp_path / "repaired"
    assert main(["compress", source, str(repaired), "--compressed", str(out), *common]) == 0
    assert "repair: " in capsys.readouterr().out
    assert is_complete(repaired)
    both = json.loads((repaired / REPORT).read_text())
    assert both["settings"] == report["settings"]
    assert both["repair"]["fold_texts"] >= 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scheme", "prune", "--sparsity", "1.2"], "--sparsity 1.2: it is the part of the weights that is dropped"),
        (["--scheme", "prune", "--sparsity", "0.4", "--pattern", "2:4"], "--sparsity 0.4: the pattern 2:4 drops one"),
        (["--scheme", "prune"], "--scheme prune needs --sparsity"),
        (["--scheme", "w4a16", "--pattern", "2:4"], "--pattern is for --scheme prune"),
    ],
)
def test_one_line_names_what_is_wrong(
    flags: list[str], message: str, given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", given[0], str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert list(tmp_path.iterdir()) == []
