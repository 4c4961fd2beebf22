"""Adapters for checkpoints that llmcompressor itself has made by GPTQ and AWQ, in groups of 128."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
import transformers
from tests.bench.llmcompressor import QUANTIZE, compress
from tests.bench.recovery.adapters.checkpoints import AWQ_GRID
from tests.support.adapter_models import VOCABULARY, random_texts, save, tiny_model

from hemostat_lab.adapters.build import BuildOptions, build, judged
from hemostat_lab.adapters.pair import CheckpointPair

pytestmark = [
    pytest.mark.slow,  # the first one installs llmcompressor
    pytest.mark.timeout(1800),
]

GROUP_SIZE = 128
"""It divides the tiny model's widths, 256 and 384."""


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_its_groups_of_128_are_read_and_corrected(method: str, tmp_path: Path) -> None:
    reference = save(tiny_model(), tmp_path / "reference")
    words = tokenizers.models.WordLevel({str(n): n for n in range(VOCABULARY)}, unk_token="0")
    tokenizer = tokenizers.Tokenizer(words)
    # llmcompressor wants one, also where the texts are token ids.
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="0").save_pretrained(reference)
    calibration = [text.ids.tolist() for text in random_texts(32, seed=1)]
    compressed = tmp_path / method
    compress(QUANTIZE, reference, compressed, calibration, method, str(GROUP_SIZE), str(AWQ_GRID))
    pair = CheckpointPair.open(reference, compressed)
    assert all(pair.compressed.is_quantized(name) for name in pair.skeleton.linears)
    for name in pair.skeleton.linears:
        scales = pair.scales(name.rpartition(".")[0].rpartition(".")[0])
        error = float((pair.delta(name, scales) ** 2).sum() ** 0.5)
        assert 0.0 < error < 0.3 * float(pair.compressed.weight(name).float().norm()), name
    built = build(pair, random_texts(16), BuildOptions(rank=32, metric="kfac", shared_out=True))
    summary = judged(pair, built, random_texts(4, seed=9))[0].report["held_out"]
    assert summary["kl_before"] > 0.0
    assert summary["kl_after"] < 0.8 * summary["kl_before"]
    assert built.report["notes"] == []
