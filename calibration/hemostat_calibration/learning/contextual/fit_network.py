"""Fit the network: from the linear map, by squared error, then by KL itself for as many stages as help."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hemostat_calibration.arrays import Floats, Indices
from hemostat_calibration.learning.contextual import mlp, objective, regression
from hemostat_calibration.learning.contextual.basis import Basis
from hemostat_calibration.learning.contextual.choose import (
    SCALES,
    ProfileLimits,
    best_map_and_scale,
    exact_gains,
    mean_by_prompt,
)
from hemostat_calibration.learning.contextual.examples import HiddenExamples, HiddenRows
from hemostat_calibration.learning.contextual.fit_linear import LinearCandidate
from hemostat_calibration.learning.contextual.fitter import Candidate, Progress, Variant
from hemostat_calibration.learning.contextual.maps import (
    for_raw_inputs,
    for_standardised_inputs,
    scaled,
    standardised,
)
from hemostat_calibration.learning.contextual.regression import LowRank


class NetworkFitter:
    """Implements `Fitter[HiddenExamples]`.

    start: the linear map that the network begins as. min_tokens: rows that are needed.
    """

    def __init__(
        self, training: mlp.TrainingSettings, min_tokens: int, start: LinearCandidate, limits: ProfileLimits
    ) -> None:
        self._training = training
        self._min_tokens = min_tokens
        self._start = start
        self._limits = limits

    def fit(self, examples: HiddenExamples, progress: Progress) -> Candidate | None:
        """The network after the stage that does best on held-out rows; None with fewer rows than `min_tokens`."""
        if not examples.rows or examples.tokens < self._min_tokens:
            return None
        s = regression.standardiser(regression.total(examples.moments))
        every_token = np.arange(examples.tokens)
        rows = examples.gather(every_token)
        others = np.flatnonzero(examples.fold != examples.held_out_fold)
        stages = 1 + len(self._training.kl_stages)
        maps = self._train(
            self._start.without_held_out, s, rows, others, examples.basis, lambda d: progress("trial", d), stages
        )
        gains = exact_gains(examples.basis, examples.held_out_rows, maps, self._limits)
        stage, scale = best_map_and_scale(gains)
        gain, error = mean_by_prompt(gains[stage, scale], examples.prompt[examples.held_out])

        def refit() -> mlp.Network:
            trained = self._train(
                self._start.from_all, s, rows, every_token, examples.basis, lambda d: progress("network", d), stage + 1
            )
            return scaled(trained[-1], float(SCALES[scale]))

        return Candidate(
            variant=Variant.NETWORK_KL if stage else Variant.NETWORK,
            penalty=self._start.penalty,
            gain=gain,
            error=error,
            refit=refit,
        )

    def _train(
        self,
        start: LowRank,
        s: Floats,
        rows: HiddenRows,
        chosen: Indices,
        basis: Basis,
        progress: Callable[[float], None],
        stages: int,
    ) -> list[mlp.Network]:
        """The network after the squared error, and after each stage of KL itself: `stages` networks in all."""
        training = self._training
        x = standardised(rows.inputs, s)
        network = mlp.begin(*for_standardised_inputs(start, s), training)
        loss: objective.Objective = objective.Squared(rows.target)
        found: list[mlp.Network] = []
        schedule = ((training.epochs, training.learning_rate), *training.kl_stages)[:stages]
        for number, (epochs, rate) in enumerate(schedule):
            if number == 1:
                embedding = basis.embedding[basis.likeliest[: training.kl_ids]]
                loss = objective.Softmax(embedding, rows.compressed, rows.target)

            def stage_progress(done: float, number: int = number) -> None:
                progress((number + done) / stages)

            network = mlp.train(network, x, chosen, loss, training, epochs, rate, stage_progress)
            found.append(for_raw_inputs(network, s))
        return found
