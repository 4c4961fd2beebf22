"""Checkpoints whose inputs an engine rounds at run time: the figures are those of rounded inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.adapter_models import packed
from tests.support.doctor import TinyPair, report_of, write_tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

from tests.support.tiny_models import tiny_model  # noqa: E402

from hemostat_lab.compression.checkpoint_writer import compress_with  # noqa: E402
from hemostat_lab.compression.formats import WeightFormat  # noqa: E402
from hemostat_lab.compression.methods import without_texts  # noqa: E402
from hemostat_lab.doctor.checkpoints import CheckpointPair, kl  # noqa: E402
from hemostat_lab.doctor.pair import encode  # noqa: E402
from hemostat_lab.doctor.prompts import load  # noqa: E402
from hemostat_lab.models.checkpoint import Checkpoint  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

FORMATS = {"w8a8": WeightFormat(8, inputs="int8"), "fp8": WeightFormat(8, None, "float", "fp8")}


def rounding_model(tiny: TinyPair, kind: str) -> Any:
    """The reference with the stored weights, whose linear layers round their inputs by token, in hooks."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.reference).eval()
    stored = Checkpoint(tiny.compressed, "COMPRESSED")

    def rounded(_: Any, given: tuple[Any, ...]) -> Any:
        least, highest = (1e-7, 127) if kind == "w8a8" else (1 / 512, 448)
        scale = given[0].abs().amax(-1, keepdim=True).clamp_min(least) / highest
        steps = given[0] / scale
        return (steps.round() if kind == "w8a8" else steps.to(torch.float8_e4m3fn).float()) * scale

    for name in stored.quantized:
        module = model.get_submodule(name)
        module.weight.data.copy_(stored.weight(name))
        module.register_forward_pre_hook(rounded)
    return model


@pytest.mark.parametrize("kind", ["zero points", "GPTQ", "NVFP4"])
def test_a_format_is_read_whatever_transformers_loads(kind: str, tmp_path: Path) -> None:
    tiny = TinyPair.in_folder(tmp_path)
    model = tiny_model("llama")
    model.save_pretrained(tiny.reference)
    if kind == "zero points":
        packed(model, tiny.compressed, symmetric=False, group=64)
    else:
        written = WeightFormat(4, 64, layout="gptq") if kind == "GPTQ" else WeightFormat(4, 16, "nvfp4")
        compress_with(tiny.reference, tiny.compressed, without_texts(written))
    for folder in (tiny.reference, tiny.compressed):
        write_tokenizer(folder)
    pair = CheckpointPair(tiny.options(max_prompts=1))
    stored = Checkpoint(tiny.compressed, "COMPRESSED")
    with torch.no_grad():
        for name in stored.quantized:
            model.get_submodule(name).weight.copy_(stored.weight(name))
        ids = torch.arange(2, 30)[None]
        torch.testing.assert_close(pair.compressed_model(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("kind", list(FORMATS))
def test_the_report_is_of_rounded_inputs(kind: str, tmp_path: Path) -> None:
    tiny = TinyPair.in_folder(tmp_path)
    tiny_model("llama").save_pretrained(tiny.reference)
    write_tokenizer(tiny.reference)
    compress_with(tiny.reference, tiny.compressed, without_texts(FORMATS[kind]))
    options = tiny.options(prescribe=True, max_prompts=4)
    pair = CheckpointPair(options)
    jobs = encode(pair, load(tiny.prompts, 4), options)
    scored = [text for begin in (0, 2) for text in pair.score(jobs[begin : begin + 2], 0, False)]
    expected = rounding_model(tiny, kind)
    values, exact = [], []
    for job, text in zip(jobs, scored, strict=True):
        ids = torch.tensor([[*job.prompt.tolist(), *text.output.tolist()]])
        with torch.inference_mode():
            r, c = (model(ids).logits[0, len(job.prompt) - 1 : -1] for model in (pair.reference_model, expected))
        values.append(kl(r, c).numpy())
        exact.append(text.figures["kl_rc"])
    # Token by token they differ: what is close to the middle of two steps is rounded to either.
    exact_mean, mean = float(np.concatenate(exact).mean()), float(np.concatenate(values).mean())
    assert exact_mean == pytest.approx(mean, rel=0.2)
    report = report_of(options, tmp_path)
    assert report["layers"]["mean_kld"] > 0
    stored = Checkpoint(tiny.compressed, "COMPRESSED")
    budget = sum(stored.stored_bytes(name) for name in stored.quantized)
    weights = sum(stored.weight(name).numel() for name in stored.quantized)
    scales = sum(len(stored.weight(name)) for name in stored.quantized)
    assert report["prescription"]["budget"] == budget == weights + 4 * scales
