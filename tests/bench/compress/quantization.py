"""Quantized checkpoints of equal bytes: ours, llmcompressor's, and mixes that `hemostat doctor` prescribes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tests.bench.llmcompressor import QUANTIZE
from tests.bench.recovery.log import say

from hemostat_lab.compression.calibrated import CALIBRATIONS, Calibrated, planned
from hemostat_lab.compression.formats import WeightFormat
from hemostat_lab.compression.frame import Source
from hemostat_lab.compression.methods import EachWeight, round_dense, without_texts
from hemostat_lab.compression.plan import LayerPlan, Plan, stored_bytes
from hemostat_lab.doctor.options import Target
from hemostat_lab.doctor.prescription.losses import predicted_losses
from hemostat_lab.doctor.prescription.mixes import prescribe
from hemostat_lab.models.parts import Parts

from .cases import Bench, Case, Must

NAME = "quantization"
GROUP_SIZE = 64
"""The width of SmolLM2, 576, is not a multiple of 128."""
W4A16 = WeightFormat(4, GROUP_SIZE)
W8A8 = WeightFormat(8, inputs="int8")
FP4 = {"NVFP4": LayerPlan(4, 16, kind="nvfp4"), "MXFP4": LayerPlan(4, 32, kind="mxfp4")}
DENSE_BITS = (3, 5, 6)
"""Written dense: vLLM packs 4 and 8 bits only."""
BEST = "descent"
MIXED: Sequence[tuple[int, Target]] = ((4, "vllm-cpu"), (4, "vllm"), (4, "any"), (5, "any"), (6, "any"))
"""Bits of the uniform mix of equal bytes, and what the mix is for: `doctor --plan-for`."""
LOSS_TOKENS = 6000


def cases(bench: Bench) -> Sequence[Case]:
    size = bench.size(LayerPlan(4, GROUP_SIZE))
    result = [Case("W4A16 nearest", size, lambda folder: bench.ours(without_texts(W4A16), folder))]
    result += [
        Case(f"W4A16 {calibration}", size, partial(_uniform, bench, W4A16, calibration, True))
        for calibration in ("clip", "clip_kl", "awq", "gptq", "descent", "guided")
    ]
    result += [
        Case(f"llmcompressor W4A16 {method}", size, partial(_peer, bench, method)) for method in ("rtn", "gptq", "awq")
    ]
    whole = bench.size(LayerPlan(8))
    result += [
        Case("W8A8 nearest", whole, lambda folder: bench.ours(without_texts(W8A8), folder)),
        Case("W8A8 smooth", whole, partial(_uniform, bench, W8A8, "smooth", True)),
        Case("llmcompressor W8A8 smoothquant", whole, partial(_peer, bench, "smoothquant")),
    ]
    for name, plan in FP4.items():
        weight_format = WeightFormat(plan.bits, plan.group_size, plan.kind)
        nearest = without_texts(weight_format)
        result += [
            Case(f"{name} nearest", bench.size(plan), partial(bench.ours, nearest)),
            Case(f"{name} gptq", bench.size(plan), partial(_uniform, bench, weight_format, "gptq", True)),
            Case(f"{name} {BEST}", bench.size(plan), partial(_uniform, bench, weight_format, BEST, True)),
        ]
    for bits in DENSE_BITS:
        weight_format = WeightFormat(bits, GROUP_SIZE)
        size = bench.size(LayerPlan(bits, GROUP_SIZE))
        nearest = EachWeight({"bits": bits, "packed": False}, round_dense(bits, GROUP_SIZE))
        result += [
            Case(f"{bits} bits nearest", size, partial(bench.ours, nearest)),
            Case(f"{bits} bits {BEST}", size, partial(_uniform, bench, weight_format, BEST, False)),
        ]
    for bits, target in MIXED:
        size = bench.size(LayerPlan(bits, GROUP_SIZE))
        result.append(Case(_mix(bits, target), size, partial(_mixed, bench, bits, target)))
    return result


def musts() -> Sequence[Must]:
    result = [Must(f"{bits} bits {BEST}", f"{bits} bits nearest") for bits in DENSE_BITS]
    result += [Must(f"{name} {BEST}", f"{name} nearest") for name in FP4]
    result += [Must(f"W4A16 {BEST}", "W4A16 nearest"), Must("W8A8 smooth", "W8A8 nearest")]
    result += [
        Must(f"W4A16 {BEST}", f"llmcompressor W4A16 {method}", not_above=True) for method in ("rtn", "gptq", "awq")
    ]
    uniform = {4: f"W4A16 {BEST}"} | {bits: f"{bits} bits {BEST}" for bits in DENSE_BITS}
    return [*result, *(Must(_mix(bits, target), uniform[bits]) for bits, target in MIXED)]


def _mix(bits: int, target: Target) -> str:
    return f"prescribed mix for {target}, bytes of {bits} bits"


def _uniform(bench: Bench, weight_format: WeightFormat, calibration: str, packed: bool, folder: Path) -> None:
    formats = dict.fromkeys(bench.shapes, weight_format)
    bench.ours(Calibrated(formats, CALIBRATIONS[calibration], None if packed else frozenset()), folder)


def _peer(bench: Bench, method: str, folder: Path) -> None:
    bench.peer(QUANTIZE, folder, method, str(GROUP_SIZE))


def _mixed(bench: Bench, bits: int, target: Target, folder: Path) -> None:
    """The mix is prescribed from the same texts."""
    texts = []
    for ids in bench.ids:
        if sum(map(len, texts)) >= LOSS_TOKENS:
            break
        texts.append(ids)
    losses = predicted_losses(bench.reference, texts, target, "cpu", bench.seed, Parts(None), lambda done, total: None)
    mix, _ = prescribe(losses, target, bench.size(LayerPlan(bits, GROUP_SIZE)))
    source = Source.open(bench.reference)
    total = sum(stored_bytes(*shape, mix.layers[name]) for name, shape in bench.shapes.items())
    plan = Plan(source.checkpoint.digest(), dict(mix.layers), total, {})
    method, notes = planned(plan, source, CALIBRATIONS[BEST])
    say("; ".join(notes))
    bench.ours(method, folder)
