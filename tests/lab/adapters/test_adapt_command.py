"""`hemostat adapt`: the files, what it prints, and one line for each mistake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.adapter_models import VOCABULARY, TinyCheckpoints, random_texts

from hemostat.cli import main

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

OUTPUTS = {
    "hemostat-checkpoint.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "profile.safetensors",
    "report.json",
}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def records(path: Path, count: int = 16) -> Path:
    lines = [
        {
            "prompt_token_ids": text.prompt.tolist(),
            "output_token_ids": text.output.tolist(),
            "conversation": f"{n:032x}",
        }
        for n, text in enumerate(random_texts(count))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_records_become_an_adapter(tiny: TinyCheckpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hemostat_calibration.profiles.profile import CalibrationProfile

    out = tmp_path / "deep" / "out"
    command = ["adapt", str(tiny.reference), str(tiny.packed), "--out", str(out), "--rank", "32"]
    command += ["--records", str(records(tmp_path / "records")), "--model", "served"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == OUTPUTS
    report = json.loads((out / "report.json").read_text())
    profile = CalibrationProfile.from_bytes((out / "profile.safetensors").read_bytes(), report["version"])
    assert profile.model == "served"
    held = report["held_out"]
    assert held["share"] > 0.2
    assert f"{held['share']:.1%} [{held['share_low']:.1%}, {held['share_high']:.1%}] recovered" in printed
    assert "down_proj" in printed
    assert "--max-lora-rank 32" in printed
    assert "hint: " in printed, "rank 32 of 256 is more than a quarter of 4 bits"
    assert not (tmp_path / "cache" / "hemostat" / "adapt").exists() or not any(
        (tmp_path / "cache" / "hemostat" / "adapt").iterdir()
    )
    # Again into the same folder; one rank, and nothing is held out.
    other = [*command, "--rank", "1", "--metric", "diagonal", "--held-out", "0"]
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(other) == 2
    assert "was made from something else (--held-out, --metric, --rank): name another folder" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert main([*other, "--overwrite"]) == 0
    printed = capsys.readouterr().out
    assert "not judged" in printed
    assert "hint: " not in printed
    assert json.loads((out / "report.json").read_text())["held_out"] is None


def test_prompts_are_completed_by_the_compressed_model(
    tiny: TinyCheckpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    compressed = tmp_path / "compressed"
    shutil.copytree(tiny.packed, compressed)
    words = {f"w{n}": n for n in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="w0",
        eos_token="w1",
        chat_template="{% for m in messages %}w2 {{ m['content'] }} {% endfor %}w3",
    ).save_pretrained(compressed)
    rng = np.random.default_rng(0)
    lines: list[Any] = [
        {"messages": [{"role": "user", "content": f"w{a} w{b}"}]} for a, b in rng.integers(4, 97, (20, 2))
    ]
    lines.append({"prompt": "w5 w6 w7", "completion": "w8 w9"})
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, lines)))
    command = ["adapt", str(tiny.reference), str(compressed), "--prompts", str(prompts), "--out", str(tmp_path / "out")]
    command += ["--work", str(tmp_path / "work"), "--max-new-tokens", "12", "--rank", "4"]
    assert main(command) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["tokens"] > 100
    assert report["held_out"]["prompts"] > 0
    assert len(list((tmp_path / "work").glob("texts-*.part"))) == 2
    shutil.rmtree(tmp_path / "out")
    assert main(command) == 0, "from what is in the work folder"
    again = json.loads((tmp_path / "out" / "report.json").read_text())
    assert again["version"] == report["version"]
    capsys.readouterr()


def test_each_mistake_is_one_line(tiny: TinyCheckpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = records(tmp_path / "records")
    ours, theirs = str(tiny.reference), str(tiny.packed)

    def message(*arguments: str, reference: str = ours, compressed: str = theirs, out: Path = tmp_path / "out") -> str:
        assert main(["adapt", reference, compressed, "--out", str(out), *arguments]) == 2
        error = capsys.readouterr().err.splitlines()
        assert error[-1].startswith("hemostat: "), error
        assert not (tmp_path / "out").exists()
        return error[-1]

    with_records = ("--records", str(good))
    assert "REFERENCE: there is no folder /nowhere" in message(*with_records, reference="/nowhere")
    assert "COMPRESSED: there is no folder /nowhere" in message(*with_records, compressed="/nowhere")
    assert "--records: " in message("--records", str(tmp_path / "missing"))
    assert "--prompts: " in message("--prompts", str(tmp_path / "missing"))
    bad = tmp_path / "bad"
    bad.write_text(good.read_text() + '{"prompt_token_ids": [1]}\n')
    assert f"{bad}:17 is no record" in message("--records", str(bad))
    bad.write_text("[" * 100_000 + "\n")
    assert f"{bad}:1 is no record" in message("--records", str(bad))
    bad.write_text('{"prompt_token_ids": [1], "output_token_ids": [97]}\n')
    assert "token id 97 is outside of the vocabulary of 97" in message("--records", str(bad))
    bad.write_text("\n")
    assert "holds no record" in message("--records", str(bad))
    bad.write_text("".join(good.read_text().splitlines(keepends=True)[:2]))
    assert "at least 100 are needed" in message("--records", str(bad))
    assert "--max-rank is for shared-out ranks" in message(*with_records, "--max-rank", "64")
    assert "cannot be shared out" in message(*with_records, "--metric", "full", "--shared-out")
    assert "rank is 1000" in message(*with_records, "--rank", "1000")
    assert "device moon cannot be used" in message(*with_records, "--device", "moon")
    assert "'2' is not a fraction" in message(*with_records, "--held-out", "2")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    assert "holds thesis.tex, which Hemostat did not write there" in message(*with_records, "--overwrite", out=other)
    assert "is a file" in message(*with_records, out=other / "thesis.tex")


def test_another_adapter_is_not_replaced(
    tiny: TinyCheckpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter that peft has written has files of the same names."""
    out = tmp_path / "mine"
    out.mkdir()
    (out / "adapter_config.json").write_text("{}")
    (out / "adapter_model.safetensors").write_bytes(b"months of training")
    command = ["adapt", str(tiny.reference), str(tiny.packed), "--out", str(out)]
    assert main([*command, "--records", str(records(tmp_path / "records")), "--overwrite"]) == 2
    assert "mine holds adapter_config.json, which Hemostat did not write there" in capsys.readouterr().err
    assert (out / "adapter_model.safetensors").read_bytes() == b"months of training"


def test_the_same_command_again_prints_what_is_there(
    tiny: TinyCheckpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["adapt", str(tiny.reference), str(tiny.packed), "--out", str(tmp_path / "out"), "--rank", "2"]
    command += ["--records", str(records(tmp_path / "records")), "--metric", "diagonal"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    written = (tmp_path / "out" / "report.json").stat().st_mtime_ns
    assert main(command) == 0
    assert capsys.readouterr().out == printed
    assert (tmp_path / "out" / "report.json").stat().st_mtime_ns == written
