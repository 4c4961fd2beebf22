"""A grammar worker that does what the request's grammar says, which is one word."""

from __future__ import annotations

import os
import sys
import time

import numpy as np

from hemostat.ipc import child_process as child
from hemostat.shadow.grammar import wire
from hemostat.shadow.grammar.reasons import GrammarReason


def main(parent: int) -> None:
    bodies, send = child.connect_to_parent(parent, 0)
    for body in bodies:
        request = wire.REQUESTS.decode(body)
        if isinstance(request, wire.Prepare):
            failure = GrammarReason.NO_TOKENIZER if request.folder.endswith("missing") else None
            answer: wire.Answer = wire.Failed(request.id, failure, "x") if failure else wire.Prepared(request.id)
            send(wire.ANSWERS.encode(answer))
            continue
        what = request.spec.members["what"].decode()
        if what == "hang":
            time.sleep(3600)
        if what == "die":
            os._exit(3)
        if what == "bad_alloc":
            sys.stderr.write("terminate called after throwing an instance of 'std::bad_alloc'\n")
            sys.stderr.flush()
            os._exit(134)
        if what == "refuse":
            send(wire.ANSWERS.encode(wire.Failed(request.id, GrammarReason.REFUSED, "no")))
            continue
        if what == "garbage":
            send(b"\xc1")
            continue
        if what == "other":
            send(wire.ANSWERS.encode(wire.Prepared(request.id)))
            continue
        tokens = len(request.output) // 4
        table = np.array([[5]], "<u4") if what == "sets" else np.array([[0]], "<u4")
        send(wire.ANSWERS.encode(wire.Walked(request.id, table.tobytes(), np.zeros(tokens, "<i4").tobytes())))


if __name__ == "__main__":
    main(int(sys.argv[1]))
