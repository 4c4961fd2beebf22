"""`make bench-faults ARGS="--only real_engines"` as a slow test."""

from __future__ import annotations

import pytest

from .real_engines import rows


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(3600)
def test_the_real_engine_that_differs_is_named_and_its_end_breaks_no_other_stream() -> None:
    assert [row for row in rows() if not row.holds] == []
