"""Bytes against KL of what vLLM has kernels for: uniform formats, and mixes as `hemostat doctor --plan-for` prescribes.

Mixes for AMD's and Intel's GPUs have the candidates of those for CPUs. Weights are rounded once for all mixes, as the
doctor does it: errors are compensated (`gptq`) on what each layer reads in the reference. `hemostat compress` takes
what the compressed layers before it pass on, and loses less. No kernels are needed: dense copies are measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tests.bench.recovery.log import say
from transformers import AutoModelForCausalLM

from hemostat_lab.compression.formats import WeightFormat
from hemostat_lab.compression.methods import without_texts
from hemostat_lab.compression.plan import LayerPlan
from hemostat_lab.doctor.kl_meter import altered_weights
from hemostat_lab.doctor.options import Target
from hemostat_lab.doctor.pair import Ids
from hemostat_lab.doctor.prescription.candidates import candidates, candidates_key, planned_weight
from hemostat_lab.doctor.prescription.losses import LayerLosses, predicted_losses
from hemostat_lab.doctor.prescription.mixes import Mix, RoundedMixes, prescribe
from hemostat_lab.models.parts import Parts
from hemostat_lab.models.work_folder import WorkFolder

from .cases import Bench, Case, Must

NAME = "families"
SMALL_GROUPS, GROUPS = "W4A16 in groups of 32", "W4A16 in groups of 64"
UNIFORM = {
    "W4A16 by channel": LayerPlan(4),
    GROUPS: LayerPlan(4, 64),
    SMALL_GROUPS: LayerPlan(4, 32),
    "MXFP4": LayerPlan(4, 32, kind="mxfp4"),
    "NVFP4": LayerPlan(4, 16, kind="nvfp4"),
    "W8A16 by channel": LayerPlan(8),
}
NEAREST = (GROUPS, "MXFP4", "NVFP4")
"""Also rounded to nearest, without compensation."""
FP8 = WeightFormat(8, kind="float", inputs="fp8")
FAMILIES: tuple[Target, ...] = ("vllm", "vllm-cpu")
"""Names of `--plan-for`. The candidates of the second are among those of the first."""
BUDGETS = {GROUPS: UNIFORM[GROUPS], "NVFP4": UNIFORM["NVFP4"], "5 bits": LayerPlan(5, 64), "6 bits": LayerPlan(6, 64)}
MAX_TOKENS = 6000

Weights = AbstractContextManager[None]


def cases(bench: Bench) -> Sequence[Case]:
    mixes = _Mixes(bench)
    result = [
        Case(f"{name}, nearest", bench.size(UNIFORM[name]), partial(mixes.write, partial(mixes.nearest, name=name)))
        for name in NEAREST
    ]
    result += [
        Case(name, bench.size(plan), partial(mixes.write, partial(mixes.uniform, plan=plan)))
        for name, plan in UNIFORM.items()
    ]
    fp8 = without_texts(FP8)
    result.append(Case("FP8, nearest, inputs rounded", bench.size(LayerPlan(8)), partial(bench.ours, fp8)))
    for budget, plan in BUDGETS.items():
        size = bench.size(plan)
        result += [
            Case(_mix(target, budget), size, partial(mixes.write, partial(mixes.prescribed, target=target, size=size)))
            for target in FAMILIES
        ]
    return result


def musts() -> Sequence[Must]:
    """A mix is not worse than a uniform format of the same bytes, nor more candidates than fewer."""
    result = [Must(name, f"{name}, nearest") for name in NEAREST]
    result += [Must(_mix(target, GROUPS), GROUPS, not_above=True) for target in FAMILIES]
    result += [Must(_mix("vllm", "NVFP4"), name, not_above=True) for name in ("NVFP4", SMALL_GROUPS)]
    return [*result, *(Must(_mix("vllm", size), _mix("vllm-cpu", size), not_above=True) for size in BUDGETS)]


def _mix(target: Target, budget: str) -> str:
    return f"mix for {target}, bytes of {budget}"


class _Mixes:
    """Owns predicted losses and rounded weights; both are kept below the benchmark's folder, by decoder layer."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def write(self, changed: Callable[[Any], Weights], folder: Path) -> None:
        """The reference with other weights, dense."""
        model = AutoModelForCausalLM.from_pretrained(self._bench.reference, dtype="auto")
        with changed(model):
            model.save_pretrained(folder)

    def nearest(self, model: Any, name: str) -> Weights:
        modules = {layer: model.get_submodule(layer) for layer in self._bench.shapes}
        return altered_weights(modules, lambda layer, weight: planned_weight(layer, weight, UNIFORM[name], None))

    def uniform(self, model: Any, plan: LayerPlan) -> Weights:
        return self._rounded.carried_out(model, Mix(dict.fromkeys(self._bench.shapes, plan), 0, 0.0))

    def prescribed(self, model: Any, target: Target, size: int) -> Weights:
        mix, _ = prescribe(_for_target(self._losses, target), target, size)
        say(", ".join(f"{count} layers {plan}" for plan, count in Counter(mix.layers.values()).most_common()))
        return self._rounded.carried_out(model, mix)

    @cached_property
    def _texts(self) -> list[Ids]:
        texts: list[Ids] = []
        for ids in self._bench.ids:
            if sum(map(len, texts)) < MAX_TOKENS:
                texts.append(ids)
        return texts

    @cached_property
    def _losses(self) -> dict[str, LayerLosses]:
        with self._work("losses") as work:
            return predicted_losses(
                self._bench.reference, self._texts, "vllm", "cpu", self._bench.seed, Parts(work), _step
            )

    @cached_property
    def _rounded(self) -> RoundedMixes:
        """Of all candidates of every layer. The folder stays open: the weights are read from it."""
        every = {name: candidates("vllm", inputs) for name, (_, inputs) in self._bench.shapes.items()}
        count = max(map(len, every.values()))
        mixes = [
            Mix({name: plans[min(n, len(plans) - 1)] for name, plans in every.items()}, 0, 0.0) for n in range(count)
        ]
        return RoundedMixes(self._bench.reference, self._texts, mixes, "cpu", Parts(self._work("rounded")), _step)

    def _work(self, name: str) -> WorkFolder:
        key = {"texts": [ids.tolist() for ids in self._texts], "seed": self._bench.seed}
        return WorkFolder(self._bench.folder / name, key | {"candidates": candidates_key("vllm")}, "bench")


def _for_target(losses: Mapping[str, LayerLosses], target: Target) -> dict[str, LayerLosses]:
    """Without the candidates that the target does not have."""
    result = {}
    for name, layer in losses.items():
        plans = candidates(target, layer.inputs)
        chosen = [n for n, plan in enumerate(layer.plans) if plan in plans]
        result[name] = replace(layer, plans=[layer.plans[n] for n in chosen], losses=layer.losses[chosen])
    return result


def _step(done: int, total: int) -> None:
    say(f"{done} of {total} layers")
