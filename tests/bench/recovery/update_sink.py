"""Stands in for the learner's process: it reads what it is sent, and says that it has learned."""

from __future__ import annotations

import sys

import numpy as np

from hemostat.ipc import child_process
from hemostat.learner import learner_messages

ANCHORS = 4608


def main() -> None:
    bodies, send = child_process.connect_to_parent(int(sys.argv[1]), 0)

    def answer(message: learner_messages.Answer) -> None:
        send(learner_messages.ANSWERS.encode(message))

    learned = 0
    next(bodies)
    anchors = np.arange(ANCHORS, dtype="<i4").tobytes()
    answer(learner_messages.Ready(anchors, learner_messages.Learned(0, {}, {})))
    for body in bodies:
        request = learner_messages.REQUESTS.decode(body)
        assert isinstance(request, learner_messages.Learn)
        learned += sum(len(row.output) // 4 for row in request.rows)
        answer(learner_messages.Learned(learned, {}, {}))


if __name__ == "__main__":
    main()
