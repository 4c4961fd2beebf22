"""The judge's process without torch and checkpoints: `python -m tests.support.fake_judge PARENT_PID`.

To it, all models give every token the same probability, so that all distances are 0. Its reference has DIGEST.
"""

from __future__ import annotations

import sys

import numpy as np

from hemostat.adapters.live import judge_messages
from hemostat.ipc import child_process

MODULE = "tests.support.fake_judge"
DIGEST = "f" * 32
VOCAB = 512
"""The number of token ids of `tiny_checkpoints`, which imports torch."""


def answer(request: judge_messages.Request) -> judge_messages.Answer | None:
    if isinstance(request, judge_messages.Start):
        return judge_messages.Ready(DIGEST, 1)
    if isinstance(request, judge_messages.Logprobs):
        return judge_messages.Scored(request.id, flat(len(request.ids) // 4 - 1))
    if isinstance(request, judge_messages.Judge):
        tokens = len(request.output) // 4
        same = judge_messages.Distances(bytes(8 * tokens), bytes(8 * tokens), bytes([1] * tokens))
        return judge_messages.Judged(request.id, dict.fromkeys(request.versions, same), flat(tokens))
    return None


def flat(tokens: int) -> bytes:
    return np.full(tokens, -np.log(VOCAB), "<f4").tobytes()


def main(parent: int) -> None:
    bodies, send = child_process.connect_to_parent(parent, niceness=0)
    for body in bodies:
        result = answer(judge_messages.REQUESTS.decode(body))
        if result is not None:
            send(judge_messages.ANSWERS.encode(result))


if __name__ == "__main__":
    main(int(sys.argv[1]))
