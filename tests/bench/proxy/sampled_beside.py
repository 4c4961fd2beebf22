"""The cost of one sampled answer (sampled_cost.py, plugin_cost.py), in a process of this or of another checkout.

`python sampled_beside.py` prints a JSON object, from whichever `tests` and `hemostat` are first on the path.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.paths import SOURCES

ROUNDS = 150


def measure(checkout: Path, code: Path | None) -> dict[str, float]:
    """Returns milliseconds of CPU time of relay and control process together. code: the compiled Hemostat of the
    checkout; None: its sources."""
    paths = [checkout / folder for folder in SOURCES] if code is None else [code]
    path = os.pathsep.join(str(folder.resolve()) for folder in [*paths, checkout])
    program = [sys.executable, str(Path(__file__).resolve())]
    ran = subprocess.run(
        program, cwd=checkout, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, check=True
    )
    result: dict[str, float] = json.loads(ran.stdout)
    return result


async def print_costs() -> None:
    from tests.bench.proxy import plugin_cost, sampled_cost

    response, plugin = await sampled_cost.measure_both(ROUNDS), await plugin_cost.measure_both(ROUNDS)
    costs = {f"logprobs in the response, {kind}": cost.total for kind, cost in response.items()}
    costs |= {f"tokens from the plugin, {kind}": cost.total for kind, cost in plugin.items()}
    print(json.dumps(costs))


if __name__ == "__main__":
    asyncio.run(print_costs())
