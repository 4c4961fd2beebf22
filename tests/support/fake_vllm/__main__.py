"""A fake vLLM that runs until it is stopped."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import uvicorn

ROOT = Path(__file__).resolve().parents[3]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.support.fake_vllm.server import FakeVllm  # noqa: E402  the root is no package


def main() -> None:
    parser = argparse.ArgumentParser(description="A vLLM without a model.")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--token-delay", type=float, default=0.0)
    parser.add_argument("--created", type=int, help="the time that every answer claims to be of")
    arguments = parser.parse_args()
    fake = FakeVllm(seed=arguments.seed, noise=arguments.noise, token_delay=arguments.token_delay)
    fake.created = arguments.created or fake.created
    uvicorn.run(fake, host="127.0.0.1", port=arguments.port, lifespan="off", ws="none", access_log=False)


if __name__ == "__main__":
    main()
