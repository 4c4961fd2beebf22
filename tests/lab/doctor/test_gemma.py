"""Gemma-3-270M with its real weights: 262,144 ids, tied embeddings, sliding windows, no chat template."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.doctor import report_of

from hemostat_lab.compression.checkpoint_writer import compress
from hemostat_lab.doctor import DoctorOptions

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.support.gemma_checkpoint import gemma_checkpoint


@pytest.mark.slow
@pytest.mark.timeout(1800)  # each linear layer is exchanged by itself
def test_w4a16_of_gemma(tmp_path: Path) -> None:
    reference = gemma_checkpoint(print)
    compressed = reference.parent / "w4a16"
    compress(reference, compressed, "w4a16", print)
    options = DoctorOptions(
        str(reference), str(compressed), tokens=16, max_prompts=4, batch=4, device="cpu", layer_tokens=16
    )
    report = report_of(options, tmp_path)
    assert report["vocab_size"] == 262144
    assert any("neither model has a chat template" in note for note in report["notes"])
    rows = {row["name"]: row["value"] for key in ("perplexity", "divergence") for row in report[key]}
    assert rows["Mean PPL(base)"] < 500, "without its first token, <bos>, Gemma's perplexity is in the thousands"
    assert 0.01 < rows["KL(r‖c)"] < 1.5
    assert rows["noise floor: c in one prefill ‖ c in two"] < 0.1 * rows["KL(r‖c)"]
    assert len(report["layers"]["distances"]) == 18
