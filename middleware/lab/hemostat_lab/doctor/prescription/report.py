"""The prescription for a budget of bytes: predicted, and measured on other texts. Torch.

The statistics are of one half of the prompts. The prescribed mix and the best uniform ones that fit are then measured
on the other half, with the reference's weights rounded in place, all in the same way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from hemostat import __version__
from hemostat.checkpoints.errors import AdaptError
from hemostat_lab.compression.plan import LayerPlan, Plan
from hemostat_lab.doctor.checkpoints import CheckpointPair
from hemostat_lab.doctor.kl_meter import KlMeter, Text, choose
from hemostat_lab.doctor.options import DoctorError, DoctorOptions, parse_budget
from hemostat_lab.doctor.pair import Floats, Ids, json_number
from hemostat_lab.doctor.prescription.candidates import candidates_key
from hemostat_lab.doctor.prescription.losses import predicted_losses
from hemostat_lab.doctor.prescription.mixes import Mix, RoundedMixes, dense_bytes, prescribe, uniform_mixes
from hemostat_lab.models.checkpoint import Checkpoint
from hemostat_lab.models.checkpoint_folders import cache_key
from hemostat_lab.models.parts import Parts
from hemostat_lab.models.work_folder import WorkFolder

LEARNED_TOKENS = 4096
"""Positions, prompts included, that the statistics are taken of."""
MAX_UNIFORM = 3
"""Uniform mixes that are measured beside the prescribed one: those with the least predicted loss."""
DEFAULT_TOKENS = 512
"""Of the measurement, with --layer-tokens 0."""

Steps = Callable[[int, int], None]


def prescription_report(
    pair: CheckpointPair, texts: Sequence[Text], options: DoctorOptions, work: WorkFolder, steps: Steps
) -> dict[str, Any]:
    """The report's `prescription`, with the `plan`. Raises DoctorError."""
    if len(texts) < 2:
        raise DoctorError("a prescription needs at least 2 prompts: one half is to learn from, the other to measure")
    target = options.plan_for
    learned, held_out = texts[0::2], texts[1::2]
    reference, device, positions = Path(options.reference), str(pair.device), _positions(learned, LEARNED_TOKENS)
    try:
        losses = predicted_losses(
            reference,
            positions,
            target,
            device,
            options.seed,
            Parts(work, f"prescription-{candidates_key(target)}-"),
            lambda done, total: steps(done, total + total // 2),
        )
        dense = dense_bytes(losses)
        budget = budget_bytes(options.budget, dense, Path(options.compressed), list(losses))
        mix, bound = prescribe(losses, target, budget)
        uniform = uniform_mixes(losses, budget)[:MAX_UNIFORM]
        mixes = [mix, *(uniform_mix for _, uniform_mix in uniform)]
        parts = Parts(work, f"rounded-{cache_key(msgspec.to_builtins([mix.layers for mix in mixes]))}-")
        rounded = RoundedMixes(
            reference, positions, mixes, device, parts, lambda done, total: steps(2 * total + done, 3 * total)
        )
    except AdaptError as error:
        raise DoctorError(f"--prescribe: {error}") from None
    with torch.inference_mode():
        measured = _measure(pair, choose(held_out, options.layer_tokens or DEFAULT_TOKENS), mix, uniform, rounded)
    rounded.drop()
    plan = Plan(
        pair.reference.digest,
        dict(mix.layers),
        mix.size,
        {
            "hemostat": __version__,
            "for": target,
            "budget": budget,
            "method": "Fisher information by token, compensated errors",
            "seed": options.seed,
            "predicted_kl_nats": mix.predicted,
            "measured_kl_nats": measured["mean_kld"],
            "measured_tokens": measured["tokens"],
        },
    )
    return {
        "target": target,
        "budget": budget,
        "bytes": mix.size,
        "bits_per_weight": 16 * mix.size / dense,
        "predicted": json_number(mix.predicted),
        "predicted_lower_bound": json_number(bound),
        "learned_requests": len(learned),
        "learned_positions": sum(map(len, positions)),
        "unreached": [name for name, loss in losses.items() if not loss.reached],
        "counts": dict(Counter(layer.name for layer in mix.layers.values()).most_common()),
        "plan": msgspec.to_builtins(plan),
        **measured,
    }


def _positions(texts: Sequence[Text], limit: int) -> list[Ids]:
    """Prompts and outputs, `limit` tokens in all."""
    result: list[Ids] = []
    left = limit
    for text in texts:
        ids = np.concatenate([text.prompt, text.output])[:left]
        if len(ids) < 2:
            break
        result.append(ids)
        left -= len(ids)
    return result


def _measure(
    pair: CheckpointPair,
    texts: Sequence[Text],
    mix: Mix,
    uniform: Sequence[tuple[LayerPlan, Mix]],
    rounded: RoundedMixes,
) -> dict[str, Any]:
    """KL(r‖c) of the mixes and of COMPRESSED, and differences from the prescribed one, token by token."""
    model = pair.reference_model
    meter = KlMeter(model, texts, pair.device)
    meter.prepare()
    compressed = meter.measure(pair.compressed_model)

    def measure(mix: Mix) -> Floats:
        with rounded.carried_out(model, mix):
            return meter.measure(model)

    prescribed = measure(mix)

    def row(name: str, size: int | None, predicted: float | None, values: Floats) -> dict[str, Any]:
        mean, more = meter.sample.mean(values), meter.sample.mean(values - prescribed)
        return {
            "name": name,
            "bytes": size,
            "predicted": predicted,
            "mean_kld": json_number(mean.value),
            "mean_kld_se_by_request": json_number(mean.by_request),
            "more_than_prescribed": json_number(more.value),
            "more_se_by_request": json_number(more.by_request),
        }

    own = row("prescribed", mix.size, mix.predicted, prescribed)
    others = [row(f"uniform {plan.name}", mix.size, mix.predicted, measure(mix)) for plan, mix in uniform]
    return {
        "tokens": len(prescribed),
        "requests": len(texts),
        "mean_kld": own["mean_kld"],
        "mean_kld_se_by_request": own["mean_kld_se_by_request"],
        "compared": [own, *others, row("COMPRESSED", None, None, compressed)],
    }


def budget_bytes(given: str | None, dense: int, compressed: Path, layers: Sequence[str]) -> int:
    """Bytes for the linear layers `layers`; None: as many as COMPRESSED stores. dense: of them at 16 bits.

    Raises DoctorError where COMPRESSED stores them dense, so that its size is no budget, and AdaptError.
    """
    if given is not None:
        value = parse_budget(given)
        return round(value * dense) if value <= 1.0 else int(value)
    checkpoint = Checkpoint(compressed, "COMPRESSED")
    if not all(checkpoint.is_quantized(name) for name in layers):
        raise DoctorError(
            "--budget: not all layers of COMPRESSED are stored quantized, so that its size is no budget; give a number "
            "of bytes, or a share of REFERENCE's"
        )
    return sum(checkpoint.stored_bytes(name) for name in layers)
