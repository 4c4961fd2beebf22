"""Fit a map where either model is known by a list of ids only, by the KL divergence over those ids (`objective.Lists`).

A first map comes from regressing that objective's slope at no change on the features, which also gives the penalty and
the rank; it is then improved by descending the objective itself.

The ids behind the lists are not learned from; with a small model they hold 30 % of the mass at 20 ids. In a first study
on int4 weights, 64 ids recovered 14 % of the divergence where hidden states recovered 22 %.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hemostat_calibration.arrays import Indices
from hemostat_calibration.learning.contextual import mlp, regression
from hemostat_calibration.learning.contextual.basis import evenly_spread
from hemostat_calibration.learning.contextual.choose import SCALES, mean_by_prompt
from hemostat_calibration.learning.contextual.examples import MAX_HELD_OUT, ListExamples
from hemostat_calibration.learning.contextual.fitter import Candidate, Progress, Variant
from hemostat_calibration.learning.contextual.maps import (
    for_raw_inputs,
    for_standardised_inputs,
    scaled,
    standardised,
)
from hemostat_calibration.learning.contextual.regression import LowRank
from hemostat_calibration.learning.contextual.rows import FOLDS
from hemostat_calibration.learning.contextual.statistics import moments_of_rows

_START_SCALES = np.array([1.0, 0.7, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05])
"""Scales of the first map that the descent may begin from."""


class ListFitter:
    """Implements `Fitter[ListExamples]`. training: of the descent; None descends on the linear map alone."""

    def __init__(self, ranks: Sequence[int], training: mlp.TrainingSettings | None) -> None:
        self._ranks = ranks
        self._training = training or mlp.TrainingSettings(units=0)

    def fit(self, examples: ListExamples, progress: Progress) -> Candidate | None:
        """The map after the descent; None where no linear map gains in cross-validation."""
        progress("linear", 0.0)
        inputs, lists, fold = examples.inputs, examples.lists, examples.fold
        every_token = np.arange(len(inputs))
        slopes = lists.slope(every_token, np.zeros((len(inputs), len(examples.basis.root)), np.float32))
        folds = [moments_of_rows(inputs, -slopes, np.where(fold == k, examples.weight, 0.0)) for k in range(FOLDS)]
        found = regression.choose(folds, self._ranks)
        if found is None:
            return None
        out, held = examples.held_out_fold, examples.held_out
        whole = regression.total(folds)
        s = regression.standardiser(whole)
        x = standardised(inputs[:, :-1], s)
        training = self._training

        def descended(start: LowRank, chosen: Indices, stage: str) -> mlp.Network:
            """From the best scale of the start."""
            begun = mlp.begin(*for_standardised_inputs(start, s), training)
            some = evenly_spread(chosen, MAX_HELD_OUT)
            gains = lists.gains(some, begun.image(x[some].astype(np.float32)), _START_SCALES)
            begun = scaled(begun, float(_START_SCALES[int(np.argmax(gains.mean(axis=1)))]))
            return mlp.train(
                begun,
                x,
                chosen,
                lists,
                training,
                training.epochs,
                training.learning_rate,
                lambda d: progress(stage, d),
            )

        without = regression.fitted(whole - folds[out], [found.penalty], len(found.read))[0]
        trial = descended(without, np.flatnonzero(fold != out), "trial")
        gains = lists.gains(held, trial.image(x[held].astype(np.float32)), SCALES)
        scale = int(np.argmax(gains.mean(axis=1)))
        gain, error = mean_by_prompt(gains[scale], examples.prompt[held])

        def refit() -> mlp.Network:
            return scaled(for_raw_inputs(descended(found, every_token, "lists"), s), float(SCALES[scale]))

        return Candidate(variant=Variant.LIST, penalty=found.penalty, gain=gain, error=error, refit=refit)
