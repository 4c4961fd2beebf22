"""GPTQ's and AWQ's layouts, NVFP4 and MXFP4 as they are written: what is read back, and the error that is left."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.support.adapter_models import random_texts, save, tiny_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

from hemostat.cli import main  # noqa: E402
from hemostat_lab.compression.calibrated import (  # noqa: E402
    CALIBRATIONS,
    Calibrated,
    calibrated_weight,
)
from hemostat_lab.compression.checkpoint_writer import BuildEnvironment, compress_with  # noqa: E402
from hemostat_lab.compression.error_compensation import quadratic_error  # noqa: E402
from hemostat_lab.compression.formats import WeightFormat, on_grid, restored, stored  # noqa: E402
from hemostat_lab.compression.frame import Source  # noqa: E402
from hemostat_lab.compression.input_moments import InputMoments  # noqa: E402
from hemostat_lab.compression.methods import nearest, without_texts  # noqa: E402
from hemostat_lab.compression.unpacking import unpacked_copy  # noqa: E402
from hemostat_lab.models.checkpoint import Checkpoint  # noqa: E402
from hemostat_lab.models.copies import Copy  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

FORMATS = {
    "w4a16_gptq": WeightFormat(4, 64, layout="gptq"),
    "w8a16_gptq": WeightFormat(8, layout="gptq"),
    "w4a16_awq": WeightFormat(4, 64, layout="awq"),
    "nvfp4": WeightFormat(4, 16, "nvfp4"),
    "mxfp4": WeightFormat(4, 32, "mxfp4"),
}
BITS = {"w4a16_gptq": 5.0, "w8a16_gptq": 8.6, "w4a16_awq": 4.6, "nvfp4": 4.6, "mxfp4": 4.3}
"""Of a weight, scales and zero points included, at most."""


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_written_is_read_as_it_was_chosen(kind: str, tmp_path: Path) -> None:
    model = tiny_model(num_hidden_layers=1).to(torch.bfloat16)
    source = save(model, tmp_path / "source")
    method = Calibrated(dict.fromkeys(Source.open(source).shapes, FORMATS[kind]), CALIBRATIONS["descent"])
    texts = [text.ids for text in random_texts(6)]
    report = compress_with(source, tmp_path / "out", method, texts, environment=BuildEnvironment(tmp_path / "work"))
    checkpoint = Checkpoint(tmp_path / "out", "COMPRESSED")
    assert len(checkpoint.quantized) == 7
    errors = next(iter(report["layers"].values()))["relative_error"]
    assert checkpoint.quantized == errors.keys()
    for name in checkpoint.quantized:
        weight, original = checkpoint.weight(name), model.get_submodule(name).weight.float()
        assert 0 < float((weight - original).norm() / original.norm()) < 0.25, name
        assert checkpoint.stored_bytes(name) * 8 / weight.numel() < BITS[kind]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == {"gptq": "gptq", "awq": "awq"}.get(FORMATS[kind].layout, "compressed-tensors")
    dense = Copy.load(unpacked_copy(tmp_path / "out"), dtype="float32")
    ids = texts[0]
    np.testing.assert_array_equal(Copy.load(tmp_path / "out", dtype="float32").logits(ids), dense.logits(ids))
    if FORMATS[kind].layout == "compressed-tensors":
        dequantize = transformers.CompressedTensorsConfig(run_compressed=False)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.bfloat16, quantization_config=dequantize
        )
        for name in checkpoint.quantized:
            assert torch.equal(theirs.get_submodule(name).weight.float(), checkpoint.weight(name).bfloat16().float())


@pytest.mark.parametrize("kind", FORMATS)
def test_the_layers_own_tensors_are_the_grid(kind: str) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(3)) * 0.05
    weight[0] = 0
    weight[1, :16] *= 1e-4
    quantized = nearest("layer", weight.bfloat16(), FORMATS[kind])
    again = restored(FORMATS[kind], stored(quantized))
    assert torch.equal(again, on_grid(quantized))
    assert torch.equal(again[0], torch.zeros(128))


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_errors_of_fp4_are_compensated(kind: str) -> None:
    """On the inputs, GPTQ leaves less than rounding to nearest, and coordinate descent less than GPTQ."""
    random = torch.Generator().manual_seed(5)
    weight = (torch.randn(48, 128, generator=random) * 0.05).bfloat16()
    inputs = torch.randn(400, 128, generator=random) @ torch.randn(128, 128, generator=random)
    moments = InputMoments(inputs.T @ inputs, 400)
    left = {}
    for rounding in ("nearest", "gptq", "descent"):
        new = calibrated_weight("layer", weight, moments, FORMATS[kind], None, rounding)
        left[rounding] = float(quadratic_error(weight.float(), moments.total, on_grid(new)).sum())
    assert left["gptq"] < 0.7 * left["nearest"]
    assert left["descent"] < left["gptq"]


def test_without_texts(tmp_path: Path) -> None:
    source = save(tiny_model(num_hidden_layers=1), tmp_path / "source")
    compress_with(source, tmp_path / "out", without_texts(FORMATS["nvfp4"]))
    assert len(Checkpoint(tmp_path / "out", "COMPRESSED").quantized) == 7


def test_outputs_that_do_not_fill_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tiny_model(num_hidden_layers=1, intermediate_size=388), tmp_path / "source")
    arguments = ["--scheme", "w4a16_gptq", "--calibrate", "none", "--group-size", "channel"]
    assert main(["compress", str(source), str(tmp_path / "out"), *arguments]) == 2
    said = capsys.readouterr().err
    assert "has 256 inputs and 388 outputs, which 4 bits do not pack into whole words: use w4a16" in said
    assert main(["compress", str(source), str(tmp_path / "out"), "--scheme", "w4a16", *arguments[2:]]) == 0
