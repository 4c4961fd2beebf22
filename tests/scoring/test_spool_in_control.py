"""The control process writes captures to the spool if there is no reference."""

from __future__ import annotations

from pathlib import Path

from tests.support.captures import capture
from tests.support.control import settings
from tests.support.waiting import until

from hemostat.control.composition import Control
from hemostat.scoring.spool.segments import segments


async def test_captures_go_to_the_spool_without_a_reference(tmp_path: Path) -> None:
    import asyncio

    given = settings().model_dump(mode="python") | {"spool": {"path": tmp_path, "key": "plain"}}
    given["reference"] = {"backend": "none"}
    one = Control(type(settings()).model_validate(given), 0)
    loops = [asyncio.create_task(loop) for loop in one.pipeline.loops()]
    one.pipeline.offer(capture("x"))
    await until(lambda: one.pipeline.pending == 0)
    for loop in loops:
        loop.cancel()
    await asyncio.gather(*loops, return_exceptions=True)
    assert one.spool is not None
    await one.close()
    assert one.spool.written == 1
    assert len(segments(tmp_path)) == 1
