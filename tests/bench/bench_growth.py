"""How each part grows: `make bench-growth`, a table with fitted exponents and build/bench/growth.json.

Every point runs in a process of its own, on one core: CPU seconds of a call, the least of some, and how much memory
the process took beyond what it had before. Weights are random, of the shapes of models of 1B, 8B and 70B parameters,
one layer at a time. The exponent of time is fitted through all points; ± is 95 %. What follows for a model of 70B is
computed from the laws and from the stated assumptions, and marked so.

    make bench-growth ARGS="--largest 4096"     widths of the parts that take their third power, 8192 at most
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tests.bench.growth.law import Assumed, Law, computed  # noqa: E402
from tests.bench.growth.parts import Part, parts  # noqa: E402

BUILD = ROOT / "build" / "bench"
LEAST_SECONDS = 0.3
"""Calls of one point are repeated for so long, CPU time, three times at most."""
MIB = 1 << 20


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measured(make: Callable[[int], Callable[[], Any]], size: int, pipe: Any) -> None:
    """In a process of its own: (CPU seconds of one call, peak bytes beyond those before)."""
    before = resident()
    call = make(size)
    times: list[float] = []
    while len(times) < 3 and sum(times) < LEAST_SECONDS:
        started = time.process_time()
        call()
        times.append(time.process_time() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    getattr(call, "close", lambda: None)()
    pipe.send((min(times), max(peak - before, 1)))


def point(part: Part, size: int) -> tuple[float, int]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=measured, args=(part.make, size, theirs))
    process.start()
    theirs.close()
    try:
        result: tuple[float, int] = ours.recv()
    except EOFError:
        raise SystemExit(f"{part.name}, {part.grows} {size}: the process ended without a result") from None
    finally:
        process.join()
    return result


def row(part: Part) -> dict[str, Any]:
    points = [point(part, size) for size in part.sizes]
    law = Law.through(part.sizes, [seconds for seconds, _ in points])
    print(
        f"{part.name:<36} {part.grows:<11} {part.sizes[0]:>10,} to {part.sizes[-1]:>11,}  "
        f"{1000 * points[0][0]:>9.2f} to {1000 * points[-1][0]:>9.1f} ms  "
        f"n^{law.exponent:.2f} ± {law.half_width:.2f}  {points[0][1] / MIB:>7.0f} to {points[-1][1] / MIB:>6.0f} MiB  "
        f"{part.fixed}",
        flush=True,
    )
    return {
        "part": part.name,
        "grows": part.grows,
        "fixed": part.fixed,
        "sizes": list(part.sizes),
        "seconds": [seconds for seconds, _ in points],
        "bytes": [size for _, size in points],
        "law": asdict(law),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=2048)
    parser.add_argument("--only", default="", help="parts whose name has this in it")
    given = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    rows = [row(part) for part in parts(given.largest) if given.only in part.name]
    result: dict[str, Any] = {"rows": rows, "seconds": round(time.monotonic() - began, 1)}
    solves = [item for item in rows if (item["part"], item["grows"]) == ("a correction (adapter)", "width")]
    if solves:
        assumed = Assumed()
        result |= {"assumed": asdict(assumed), "computed": dict(computed(assumed, Law(**solves[0]["law"])))}
        print(f"\ncomputed, not measured, of {assumed}:")
        for name, value in result["computed"].items():
            print(f"  {name}: {value:,.0f}")
    BUILD.mkdir(parents=True, exist_ok=True)
    path = BUILD / "growth.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{path}, {result['seconds']} s")


if __name__ == "__main__":
    main()
