"""Tokens a second on one core: divergences of log-probabilities that are there, and what is made of them.

    python -m tests.bench.scoring_rates --beside FOLDER --rounds 5

compares the rates with the revision whose tree is in FOLDER, in alternating processes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path

from tests.bench import beside

MODULE = "tests.bench.scoring_rates"
CAPTURES = 1000
RATES = {
    "divergence_64": "divergences, requests of 64 tokens, one at a time",
    "divergences_64": "…, 16 together",
    "report": "figures of a report from scored rows, requests of 128 tokens",
    "live": "the control process from the capture to the figures, 128 tokens",
}


def told() -> None:
    from tests.bench.bench_bounds import speed
    from tests.bench.bench_spool import live_rate, report_rate
    from tests.bench.load import TOKENS

    rates = speed(rounds=5)
    result = {name: rates[name]["median"] for name in ("divergence_64", "divergences_64")}
    result["report"] = TOKENS * asyncio.run(report_rate(CAPTURES))
    result["live"] = TOKENS * asyncio.run(live_rate(CAPTURES))
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=Path, help="the tree of another revision")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(beside.CHILD, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        told()
    elif options.beside is not None:
        beside.compared(MODULE, options.beside, options.rounds, RATES, "tokens a second")
    else:
        print(json.dumps(beside.measured(MODULE), indent=1))


if __name__ == "__main__":
    main()
