"""Texts that are longer than a model with learned positions can read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tests.support.adapter_models import VOCABULARY

from hemostat.cli import main

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("compressed_tensors")

from hemostat_lab.models.generation import generate  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

POSITIONS = 24
LENGTHS = (9, 10, 11, 12, 18, 22, 23, 24, 25, 40, 60)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OPT, with a tokenizer whose words are numbers."""
    folder = tmp_path_factory.mktemp("opt") / "model"
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=POSITIONS,
        eos_token_id=None,
        init_std=0.2,
    )
    transformers.OPTForCausalLM(config).save_pretrained(folder)
    words = tokenizers.models.WordLevel({str(n): n for n in range(VOCABULARY)}, unk_token="0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def ids(length: int) -> list[int]:
    return np.random.default_rng(length).integers(2, VOCABULARY, length).tolist()


def records(path: Path) -> Path:
    """Texts of LENGTHS; the outputs of the longest ones begin after the last position."""
    lines = [{"prompt_token_ids": ids(n)[: n - 8], "output_token_ids": ids(n)[n - 8 :]} for n in LENGTHS]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def notes(error: str) -> str:
    return " ".join(error.split())


def test_longer_records_are_cut_with_a_note(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = tmp_path / "small"
    known = ["--records", str(records(tmp_path / "records"))]
    format_of = ["--scheme", "w4a16", "--group-size", "32", "--calibrate", "gptq"]
    assert main(["compress", str(source), str(small), *format_of, *known]) == 0
    said = notes(capsys.readouterr().err)
    assert f"note: 3 of 11 texts are cut at {POSITIONS} tokens" in said
    assert f"calibrating on {sum(min(n, POSITIONS) for n in LENGTHS)} tokens of 11 texts" in said
    repaired = tmp_path / "repaired"
    assert main(["compress", str(source), str(repaired), "--compressed", str(small), *known]) == 0
    assert "3 of 11 texts are cut" in notes(capsys.readouterr().err)
    options = ["--out", str(tmp_path / "adapter"), "--held-out", "0", "--rank", "2"]
    assert main(["adapt", str(source), str(small), *known, *options]) == 0
    assert "3 of 11 texts are cut" in notes(capsys.readouterr().err)


def test_completions_end_at_the_last_position(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prompts of 9 to 60 tokens, completed together."""
    prompts = tmp_path / "prompts"
    prompts.write_text("".join(" ".join(map(str, ids(n))) + "\n" for n in LENGTHS))
    command = ["compress", str(source), str(tmp_path / "out"), "--scheme", "w4a16", "--group-size", "32"]
    assert main([*command, "--prompts", str(prompts), "--calibrate", "gptq"]) == 0
    said = notes(capsys.readouterr().err)
    assert f"note: 3 of 11 texts are cut at {POSITIONS} tokens" in said
    assert f"calibrating on {11 * POSITIONS} tokens of 11 texts" in said


def test_a_finished_text_does_not_move_beyond_the_last_position(source: Path) -> None:
    """It stays in the batch until the others end."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    prompts = [np.array(ids(n), np.int32) for n in (3, 20)]
    limits = [POSITIONS - len(prompt) for prompt in prompts]
    uniforms = [np.random.default_rng(n).random(POSITIONS) for n in range(2)]

    def generated(rows: Sequence[int]) -> list[list[int]]:
        with torch.inference_mode():
            chosen = ([values[row] for row in rows] for values in (prompts, limits, uniforms))
            return [text.tolist() for text in generate(model, *chosen, frozenset())]

    assert generated([0, 1]) == generated([0]) + generated([1])
