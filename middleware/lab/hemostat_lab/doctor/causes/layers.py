"""Which layers and modules cost what: errors of each layer, and KL(r‖c) when parts of the models are exchanged. Torch.

- Restore one: the compressed model with one part of the reference. `won` is how much KL(r‖c) falls.
- Restore all but one: the reference with one part of the compressed model. `alone` is its KL(r‖c).

If the effects of layers were independent, what they cost alone would add up to the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np
import torch

from hemostat_lab.doctor.causes.distances import Distances, distances
from hemostat_lab.doctor.causes.units import Unit, compressed_alone, layer_pairs, restored, units_of
from hemostat_lab.doctor.checkpoints import CheckpointPair
from hemostat_lab.doctor.estimates import Sample
from hemostat_lab.doctor.kl_meter import KlMeter, Text, choose
from hemostat_lab.doctor.pair import Floats, json_number
from hemostat_lab.models.work_folder import WorkFolder

MODULE_SHARE = 4
"""Single linear layers, of which there are many, are measured on one MODULE_SHAREth of the tokens."""
MAX_MODULES = 512
"""Of these, in the layers that cost most alone."""

Steps = Callable[[int, int], None]
"""Called with (finished steps, all steps)."""


def layer_report(pair: CheckpointPair, texts: Sequence[Text], work: WorkFolder, steps: Steps) -> dict[str, Any]:
    """The report's `layers`. Finished steps are stored in `work`. Raises Incomparable."""
    with torch.inference_mode():
        return _Measurement(pair, texts, work, steps).report()


class _Measurement:
    def __init__(self, pair: CheckpointPair, texts: Sequence[Text], work: WorkFolder, steps: Steps) -> None:
        self._pair = pair
        self._layers = layer_pairs(pair.reference_model, pair.compressed_model)
        units = units_of(pair.reference_model, pair.compressed_model)
        self._parts = [unit for unit in units if unit.kind != "module"]
        self._modules = [unit for unit in units if unit.kind == "module"]
        self._meter = KlMeter(pair.reference_model, texts, pair.device)
        tokens = sum(len(text.output) for text in texts)
        self._module_meter = KlMeter(pair.reference_model, choose(texts, -(-tokens // MODULE_SHARE)), pair.device)
        self._work = work
        self._steps = steps
        self._done = 0
        self._total = 3 + 2 * len(self._parts) + min(len(self._modules), MAX_MODULES)

    def report(self) -> dict[str, Any]:
        meter, pair = self._meter, self._pair
        self._steps(0, self._total)
        errors = self._stored("layer-distances", Distances, lambda: distances(pair, *self._layers, meter.texts))
        base = self._values("layer-base", lambda: meter.measure(pair.compressed_model))
        floor = self._values("layer-floor", meter.floor)
        alone: dict[str, Floats] = {}
        rows = []
        for n, unit in enumerate(self._parts):
            left = self._values(f"layer-{n:04d}", partial(self._restored, unit))
            alone[unit.name] = self._values(f"alone-{n:04d}", partial(self._alone, unit, meter))
            rows.append(_part_row(unit, meter.sample, base, left, alone[unit.name]))
        mean = meter.sample.mean(base)
        return {
            "tokens": len(base),
            "requests": meter.sample.requests,
            "mean_kld": json_number(mean.value),
            "mean_kld_se_by_request": json_number(mean.by_request),
            "noise_floor": json_number(np.mean(floor)) if len(floor) else None,
            "distances": [
                {"layer": n, "accumulated": a, "cosine": c, "alone": e}
                for n, (a, c, e) in enumerate(zip(errors.accumulated, errors.cosine, errors.alone, strict=True))
            ],
            "restored": rows,
            "additivity": self._additivity(base, alone),
            "modules": self._module_rows(alone),
        }

    def _additivity(self, base: Floats, alone: dict[str, Floats]) -> dict[str, Any] | None:
        """What layers and ends cost alone, added up, compared with the whole; None where only one part differs."""
        whole = [alone[unit.name] for unit in self._parts if unit.kind in ("layer", "ends")]
        if len(whole) < 2:
            return None
        added = np.sum(whole, axis=0)
        total, excess = self._meter.sample.mean(added), self._meter.sample.mean(base - added)
        return {
            "parts": len(whole),
            "sum_alone": json_number(total.value),
            "sum_alone_se_by_request": json_number(total.by_request),
            "excess": json_number(excess.value),
            "excess_se_by_request": json_number(excess.by_request),
        }

    def _module_rows(self, alone: dict[str, Floats]) -> dict[str, Any]:
        worst_first = sorted(self._modules, key=lambda unit: -float(alone[f"layer {unit.layer}"].mean()))
        measured = {id(unit) for unit in worst_first[:MAX_MODULES]}
        sample = self._module_meter.sample
        rows = []
        for n, unit in enumerate(self._modules):
            if id(unit) in measured:
                values = self._values(f"module-{n:05d}", partial(self._alone, unit, self._module_meter))
                cost = sample.mean(values)
                rows.append(
                    {
                        "layer": unit.layer,
                        "module": unit.name.removeprefix(f"layer {unit.layer} "),
                        "alone_nats": json_number(cost.value),
                        "alone_se_by_request": json_number(cost.by_request),
                    }
                )
        return {
            "tokens": len(sample.request),
            "requests": sample.requests,
            "not_measured": len(self._modules) - len(rows),
            "rows": rows,
        }

    def _restored(self, unit: Unit) -> Floats:
        self._meter.prepare()
        with restored(unit):
            return self._meter.measure(self._pair.compressed_model)

    def _alone(self, unit: Unit, meter: KlMeter) -> Floats:
        meter.prepare()  # before the reference is altered
        with compressed_alone(unit):
            return meter.measure(self._pair.reference_model)

    def _values(self, name: str, measure: Callable[[], Floats]) -> Floats:
        return np.array(self._stored(name, list[float], lambda: measure().tolist()))

    def _stored(self, name: str, kind: Any, compute: Callable[[], Any]) -> Any:
        """The stored value of the folder, or the result of `compute`, which is then stored."""
        if (data := self._work.get(name)) is not None:
            value = msgspec.msgpack.decode(data, type=kind)
        else:
            value = compute()
            self._work.put(name, msgspec.msgpack.encode(value))
        self._done += 1
        self._steps(self._done, self._total)
        return value


def _part_row(unit: Unit, sample: Sample, base: Floats, left: Floats, alone: Floats) -> dict[str, Any]:
    won, cost = sample.mean(base - left), sample.mean(alone)
    return {
        "name": unit.name,
        "kind": unit.kind,
        "mean_kld": json_number(left.mean()),
        "won_nats": json_number(won.value),
        "won_se_by_request": json_number(won.by_request),
        "won_share": json_number(won.value / base.mean()) if base.mean() else None,
        "alone_nats": json_number(cost.value),
        "alone_se_by_request": json_number(cost.by_request),
    }
