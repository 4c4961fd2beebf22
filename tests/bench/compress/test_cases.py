"""The cases of the benchmark: equal sizes are compared, and every comparison names cases that exist."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.adapter_models import random_texts, save, tiny_model

pytest.importorskip("torch")

from tests.bench.bench_compress import MODULES
from tests.bench.compress.cases import Bench


@pytest.mark.parametrize("name", list(MODULES))
def test_comparisons_are_of_cases_of_the_same_size(name: str, tmp_path: Path) -> None:
    reference = save(tiny_model(num_hidden_layers=1), tmp_path / "reference")
    cases = {case.name: case for case in MODULES[name].cases(Bench(reference, tmp_path, random_texts(2), 0))}
    for must in MODULES[name].musts():
        assert cases[must.better].size == cases[must.worse].size, must
