"""A process that owns a store, or waits to: `python -m tests.support.owner_process URL`.

It appends an event a few times a second, and prints each state that it comes to, with the time (`time.monotonic`).
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time

from hemostat.control.ownership import Ownership, Superseded
from hemostat.store.errors import StoreErrorLog
from hemostat.store.postgres import PostgresStore

WRITE_SECONDS = 0.2


async def own(url: str) -> None:
    """Until it is superseded."""
    ownership = Ownership(PostgresStore(url), StoreErrorLog())
    await ownership.begin()
    ownership.activate()
    loops = [asyncio.create_task(loop) for loop in (ownership.watch(), ownership.writer.run())]
    said = ""
    number = 0
    while not loops[0].done():
        if said != ownership.state:
            said = ownership.state
            print(json.dumps([said, time.monotonic()]), flush=True)
        if ownership.active:
            number += 1
            ownership.writer.append_event({"by": os.getpid(), "n": number})
        await asyncio.wait([loops[0]], timeout=WRITE_SECONDS)
    try:
        await loops[0]
    except Superseded:
        print(json.dumps(["ended", time.monotonic()]), flush=True)


if __name__ == "__main__":
    asyncio.run(own(sys.argv[1]))
