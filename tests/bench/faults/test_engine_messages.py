"""The rows hold, but for how long reports are silent: that takes a machine that does nothing else."""

from __future__ import annotations

from tests.bench.faults import engine_messages


def test_neither_clients_nor_engines_change_figures_or_take_memory() -> None:
    rows = [engine_messages.figure_row(), engine_messages.tap_row(), engine_messages.names_row()]
    assert [row for row in rows if not row.holds] == []
