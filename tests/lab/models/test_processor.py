"""The dtype of the laboratory on processors that compute numbers of 16 bits slowly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hemostat_lab.models import processor

torch = pytest.importorskip("torch")


def test_detection_of_avx512() -> None:
    wide = "processor\t: 0\nmodel name\t: avx512f\nflags\t\t: fpu avx2 avx512f avx512bw\nbugs\t: none\n"
    assert processor.has_avx512(wide)
    assert not processor.has_avx512(wide.replace(" avx512f avx512bw", " avx512bw"))


@pytest.mark.parametrize(
    ("device", "slow", "is_float32"), [("cpu", True, True), ("cpu", False, False), ("cuda", True, False)]
)
def test_a_model_is_computed_in_float32_where_its_own_numbers_are_slow(
    device: str, slow: bool, is_float32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hemostat_lab.models import copies

    monkeypatch.setattr(copies, "lacks_avx512", lambda: slow)
    config = SimpleNamespace(dtype="bfloat16")
    checkpoint: Any = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
    result = copies.dtype_of(checkpoint, "auto", torch.device(device))
    assert result is (torch.float32 if is_float32 else torch.bfloat16)
    assert copies.dtype_of(checkpoint, "float16", torch.device(device)) is torch.float16, "as it is asked for"
