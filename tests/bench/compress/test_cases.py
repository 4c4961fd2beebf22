"""The cases of the benchmark: equal sizes are compared, and every comparison names cases that exist."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.support.adapter_models import random_texts, rounded, save, tiny_model

pytest.importorskip("torch")

from tests.bench.bench_compress import MODULES
from tests.bench.compress import adapters
from tests.bench.compress.cases import Bench, Case
from tests.bench.compress.figures import Meter
from tests.bench.compress.texts import Texts


@pytest.mark.parametrize("name", list(MODULES))
def test_comparisons_are_of_cases_of_the_same_size(name: str, tmp_path: Path) -> None:
    reference = save(tiny_model(num_hidden_layers=1), tmp_path / "reference")
    cases = {case.name: case for case in MODULES[name].cases(Bench(reference, tmp_path, random_texts(2), 0))}
    for must in MODULES[name].musts():
        assert cases[must.better].size == cases[must.worse].size, must


def test_a_checkpoint_is_measured_with_the_adapter_beside_it(tmp_path: Path) -> None:
    model = tiny_model(num_hidden_layers=1)
    reference = save(model, tmp_path / "reference")
    texts = random_texts(8)
    bench = Bench(reference, tmp_path / "bench", texts, 0)
    start = Case("start", 0, lambda folder: model.save_pretrained(folder, state_dict=rounded(model)))
    adapters.adapted(bench, start, 64, False, tmp_path / "adapted")
    meter = Meter(reference, Texts([], texts, np.zeros(sum(len(text.output) for text in texts), np.int64)))
    without, with_adapter = (
        meter.distances(folder).kl.mean() for folder in (bench.folder / "adapters" / "start", tmp_path / "adapted")
    )
    assert with_adapter < 0.5 * without
