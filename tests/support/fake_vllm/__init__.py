"""A vLLM without a model: the wire format of 0.32 (checked against the real server by tests/wire/test_real_vllm.py).

An ASGI application, deterministic from its seed: logits are a hash of the last tokens. A prompt whose last line is
`say: TEXT` makes it answer TEXT, token by token, so that tests choose the answer (unicode, tool calls, stop strings).
It also answers as a reference server does (`prompt_logprobs`, `/tokenize`). Faults are fields of `FakeVllm`, which may
be set at any time.

    python tests/support/fake_vllm --port 8000        # a server, for trying things by hand
"""

from __future__ import annotations

from tests.support.fake_vllm.answers import RefusedError
from tests.support.fake_vllm.listening import running, serving
from tests.support.fake_vllm.model import EOS, IM_START, VOCAB, encode, render, token_bytes
from tests.support.fake_vllm.server import FakeVllm

__all__ = [
    "EOS",
    "IM_START",
    "VOCAB",
    "FakeVllm",
    "RefusedError",
    "encode",
    "render",
    "running",
    "serving",
    "token_bytes",
]
