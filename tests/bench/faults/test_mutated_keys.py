"""A part of the mutated keys: the plugin acts on none of them."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")
from tests.bench.faults.mutated_keys import SEED, attack, harm


@pytest.mark.parametrize("seed", [SEED, SEED + 1])
def test_mutated_keys_obtain_nothing_and_harm_nobody(seed: int) -> None:
    found = attack(2000, seed)
    assert harm(found) == {}
    assert min(found[name] for name in ("sent", "refused", "sampled", "others")) > 10
