"""Second moments of what each linear layer reads and of the gradients at its outputs, one decoder layer at a time.

With gradients the model is run forwards once and then backwards (`walk`). Finished layers are stored: what is killed
goes on at the layer where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from hemostat_calibration.adapters.gram import Metric, metric_for_budget
from hemostat_lab.models.activations import Moments, measured, output_key, run_layer
from hemostat_lab.models.parts import Parts
from hemostat_lab.models.skeleton import Skeleton, WeightSource
from hemostat_lab.models.walk import LayerWalk

Progress = Callable[[str, int, int], None]
"""Called with a stage, finished steps and all steps."""
_Moments = TypeVar("_Moments", bound=Moments)
Finish = Callable[[str, _Moments], Mapping[str, torch.Tensor]]
"""Makes what is stored of a decoder layer from its name and its statistics."""

STATISTICS = "statistics"
BASE_BYTES = 700 << 20
"""Of a process with torch and transformers, before any weights."""


class LayerStatistics:
    """The statistics of one model on texts.

    source: its weights. seed: of the tokens that the gradients are taken for. gradients: measure the outputs' metric,
    too. memory_bytes: full statistics are given to as many layers as it allows, and diagonals to the others; 0:
    diagonals to all; None: full statistics to all, whatever memory they need.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        source: WeightSource,
        texts: Sequence[npt.NDArray[np.int32]],
        parts: Parts,
        *,
        gradients: bool,
        memory_bytes: int | None,
        seed: int,
        progress: Progress,
    ) -> None:
        self._skeleton = skeleton
        self._names = list(skeleton.layers)
        self._parts = parts
        self._gradients = gradients
        self._memory_bytes = memory_bytes
        self._progress = progress
        steps = len(self._names) * (1 + gradients)
        self._walk = LayerWalk(
            skeleton, source, texts, parts, seed=seed, passed=lambda n: progress(STATISTICS, n + 1, steps)
        )
        self._groups: dict[tuple[str, ...], dict[str, str]] = {}

    def run(self, finish: Finish[_Moments], make_moments: Callable[[], _Moments]) -> dict[str, dict[str, torch.Tensor]]:
        """Returns what `finish` makes of each decoder layer, by its name. Raises AdaptError, WorkFolderError.

        make_moments: makes what collects a layer's inputs and gradients.
        """
        count = len(self._names)
        result: dict[str, dict[str, torch.Tensor]] = {}
        for n in range(count - 1, -1, -1) if self._gradients else range(count):
            kept = self._parts.get(_layer(n))
            if kept is None:
                self._measure_layer(n, finish, make_moments())
                kept = self._parts.get(_layer(n))
                assert kept is not None, n
            result[self._names[n]] = kept
            done = count - n if self._gradients else n + 1
            self._progress(STATISTICS, done + count * self._gradients, count * (1 + self._gradients))
        self._walk.drop()
        return {name: result[name] for name in self._names}

    def drop(self) -> None:
        """Remove what is stored of the layers: the next run measures them again."""
        for n in range(len(self._names)):
            self._parts.drop(_layer(n))

    def _measure_layer(self, n: int, finish: Finish[_Moments], moments: _Moments) -> None:
        """Stores what is made of decoder layer `n`, and what the next layer to be measured needs."""
        layer = self._names[n]
        metrics: dict[str, Metric] = {}
        self._walk.measure(
            n,
            lambda batch: measured(self._skeleton, layer, batch.valid, moments, metrics, self._gradients),
            backwards=self._gradients,
            prepare=lambda hidden: metrics.update(self._metrics(n, hidden)),
        )
        self._parts.put(_layer(n), finish(layer, moments))
        self._walk.leave(n, backwards=self._gradients)

    def _metrics(self, n: int, hidden: Sequence[torch.Tensor]) -> dict[str, Metric]:
        """What is kept of each input and output of decoder layer `n`, which is loaded."""
        layer = self._names[n]
        linears = self._skeleton.linears_of(layer)
        same_kind = tuple(name.removeprefix(layer) for name in linears)
        if same_kind not in self._groups:
            # Which linear layers share their inputs is seen in a forward pass.
            moments = Moments()
            _, calls = self._walk.embeddings()
            with torch.no_grad(), measured(self._skeleton, layer, self._walk.batches[0].valid, moments, {}, False):
                run_layer(self._skeleton, n, hidden[0].to(self._skeleton.device), calls[0])
            self._groups[same_kind] = {
                name.removeprefix(layer): group.removeprefix(layer) for name, group in moments.groups.items()
            }
        groups = self._groups[same_kind]
        # One that the first batch does not reach, such as an expert, may be reached by another.
        widths = {}
        for name, module in linears.items():
            short = name.removeprefix(layer)
            if groups.get(short, short) == short:
                widths[name] = module.in_features
        if self._gradients:
            widths |= {output_key(name): module.out_features for name, module in linears.items()}
        if self._memory_bytes is None:
            return dict.fromkeys(widths, Metric.FULL)
        # One layer is solved at a time: its error, three products of its size, and its statistics once more.
        workspace = max(
            8 * (4 * m.in_features * m.out_features + 3 * min(m.in_features, m.out_features) ** 2)
            + 8 * max(m.in_features, m.out_features) ** 2
            for m in linears.values()
        )
        weights = sum(p.numel() * p.element_size() for p in self._skeleton.layers[layer].parameters())
        states = sum(part.numel() * part.element_size() for part in hidden) * (3 if self._gradients else 2)
        return metric_for_budget(widths, max(0, self._memory_bytes - BASE_BYTES - weights - states - workspace))


def _layer(n: int) -> str:
    return f"layer-{n:04d}"
