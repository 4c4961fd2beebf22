"""The fitted laws, and what is computed from them; every part runs at its smallest size."""

from __future__ import annotations

import numpy as np
import pytest
from tests.bench import bench_gpu
from tests.bench.growth.law import Assumed, Law, computed
from tests.bench.growth.parts import parameters_of, parts


def test_the_interval_of_an_exponent_holds_it():
    rng, sizes, held = np.random.default_rng(0), np.array([1.0, 2.0, 4.0, 8.0, 16.0]), 0
    for _ in range(400):
        law = Law.through(sizes, 3.0 * sizes**1.5 * np.exp(0.1 * rng.standard_normal(5)))
        held += abs(law.exponent - 1.5) <= law.half_width
    assert 368 <= held <= 392


def test_what_is_computed_of_a_large_model():
    given = Assumed(parameters=1e9, peak_flops=1e12, utilization=0.5, requests_per_second=1.0, prompt_tokens=9,
                    output_tokens=1, share=0.1, adapter_tokens=100, layers=2, linears_by_layer=3, width=10)  # fmt: skip
    result = computed(given, Law(0.5, 2.0, 0.0))
    assert result["scored tokens a day, prompts included"] == pytest.approx(86_400)
    assert result["GPU seconds a day to measure"] == pytest.approx(2e9 * 86_400 / 5e11)
    assert result["GPU seconds for the statistics of an adapter"] == pytest.approx(8e9 * 100 / 5e11)
    assert result["CPU seconds for the corrections of an adapter"] == pytest.approx(2 * 3 * 0.5 * 100)


LARGE = {"a decoder layer, forwards", "forwards and backwards, from disk"}
CHEAP = [part for part in parts(256) if part.name not in LARGE]


@pytest.mark.parametrize("part", CHEAP, ids=lambda part: f"{part.name}, {part.grows}")
def test_every_part_runs(part):
    pytest.importorskip("torch")
    part.make(part.sizes[0])()


def test_parameters_are_those_of_a_layer():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    with torch.device("meta"):
        config = transformers.LlamaConfig(
            hidden_size=8192, intermediate_size=28_672, num_attention_heads=64, num_key_value_heads=8
        )
        layer = LlamaDecoderLayer(config, 0)
    matrices = sum(p.numel() for p in layer.parameters() if p.ndim == 2)
    assert parameters_of("70B") == matrices


def test_steps_on_a_gpu_name_files_that_exist():
    files = [argument for step in bench_gpu.STEPS for argument in step.command if argument.endswith(".py")]
    assert len(files) == len(bench_gpu.STEPS) - 1
    assert [name for name in files if not (bench_gpu.ROOT / name).is_file()] == []


def test_steps_on_a_gpu_end_within_the_budget():
    step = bench_gpu.Step
    hanging = "import time; print('y', flush=True); time.sleep(600)"
    steps = [
        step("good", ["-c", "print('x')"], 60),
        step("bad", ["-c", "raise SystemExit(3)"], 60),
        step("hangs", ["-c", hanging], 3),
        step("two", [], 9, gpus=2),
    ]
    results = bench_gpu.run(steps, gpus=1)
    assert [result["outcome"] for result in results.values()] == [
        "passed", "failed (3)", "not finished within 3 s", "not run: needs 2 GPUs",
    ]  # fmt: skip
    assert results["good"]["output"] == "x\n"
    output = results["hangs"]["output"]
    # A busy machine may not have started it by then.
    assert not output.startswith("y\n") or "KeyboardInterrupt" in output, "it can stop its servers"
    assert bench_gpu.run(steps, gpus=1, budget=0.0)["good"]["outcome"] == "not run: no time left"
