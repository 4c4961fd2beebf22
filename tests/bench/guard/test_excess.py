"""The excess in a world whose noise is known: see `tests/bench/guard/excess.py`."""

from tests.bench.guard import excess


def test_the_excess_is_what_compression_adds() -> None:
    rows = list(excess.rows(50, 1))
    assert len(rows) == len(excess.NAMES)
    assert all(holds for *_, holds in rows), rows
