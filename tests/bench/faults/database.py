"""The same as `planes`, with the store in PostgreSQL, which is killed and stopped at random moments as well."""

from __future__ import annotations

from collections.abc import Iterator

from tests.bench.faults import Row, planes

NAME = "database"
TAKES = planes.TAKES


def rows() -> Iterator[Row]:
    return planes.rows(server=True)
