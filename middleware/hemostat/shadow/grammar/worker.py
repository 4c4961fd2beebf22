"""The grammar worker, `python -m hemostat.shadow.grammar.worker PARENT_PID`: rebuilds grammars with xgrammar.

It answers the frames of `wire.py` one after another, and ends with its standard input or its parent. Its parent ends it
where an answer takes too long; what it may allocate is limited here.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hemostat.ipc import child_process as child
from hemostat.shadow.grammar import wire
from hemostat.shadow.grammar.constraints import ServerRules, constraint_of
from hemostat.shadow.grammar.reasons import GrammarFailure, GrammarReason

if TYPE_CHECKING:
    from hemostat.shadow.grammar.walking import TokenizerGrammars

NICENESS = 10
"""Yields the processor to whatever serves clients on this machine."""
CACHE_SHARE = 4
"""One part in so many of the allowed memory is for compiled grammars that are kept."""


class Worker:
    """Owns the tokenizers, whose number the parent bounds."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[str, int], TokenizerGrammars] = {}

    def answer(self, request: wire.Request) -> wire.Answer:
        """GrammarFailure."""
        if isinstance(request, wire.Prepare):
            self._prepare(request)
            return wire.Prepared(request.id)
        return self._walk(request)

    def _prepare(self, request: wire.Prepare) -> None:
        try:
            from hemostat.shadow.grammar.walking import TokenizerGrammars  # noqa: PLC0415  an extra, and slow to import
        except ImportError as error:
            raise GrammarFailure(
                GrammarReason.NOT_INSTALLED, f"{error}; grammars need pip install 'hemostat[grammar]'"
            ) from error
        _limit_memory(None)
        try:
            cache_bytes = (request.memory_mib << 20) // CACHE_SHARE
            grammars = TokenizerGrammars(Path(request.folder), request.vocab_size, cache_bytes)
        finally:
            _limit_memory(request.memory_mib)
        self._loaded[request.folder, request.vocab_size] = grammars

    def _walk(self, request: wire.Walk) -> wire.Walked:
        from hemostat.shadow.grammar.tool_tags import make_tag  # noqa: PLC0415

        grammars = self._loaded.get((request.folder, request.vocab_size))
        if grammars is None:
            raise GrammarFailure(GrammarReason.FAILED, f"{request.folder} is not prepared")
        constraint = constraint_of(request.spec, ServerRules(request.parser, request.strict_level), make_tag)
        compiled = grammars.compile(constraint, any_whitespace=request.any_whitespace)
        stops = grammars.stop_token_ids.union(request.stop_token_ids, _own_stops(request))
        output = np.frombuffer(request.output, "<i4").astype(np.int32)
        found = grammars.walk(compiled, output, request.start, stops)
        return wire.Walked(request.id, found.table.astype("<u4").tobytes(), found.rows.astype("<i4").tobytes())


def _own_stops(request: wire.Walk) -> set[int]:
    try:
        return {int(token) for token in json.loads(request.spec.members.get("stop_token_ids", b"[]"))}
    except (ValueError, TypeError) as error:
        raise GrammarFailure(GrammarReason.INVALID, "stop_token_ids is no list of ids") from error


def _limit_memory(mib: int | None) -> None:
    """Limit what the process may allocate from now on; None: no limit. Linux only."""
    status = Path("/proc/self/status")
    if not status.exists():
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if mib is None:
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
        return
    used = next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith("VmData"))
    limit = used + (mib << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def main(parent: int) -> int:
    """Exit status: 0 when the input ended."""
    bodies, send = child.connect_to_parent(parent, NICENESS)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    worker = Worker()
    for body in bodies:
        request = wire.REQUESTS.decode(body)
        try:
            answer = worker.answer(request)
        except GrammarFailure as failure:
            answer = wire.Failed(request.id, failure.reason, str(failure))
        except (RecursionError, MemoryError) as error:
            memory = isinstance(error, MemoryError)
            reason = GrammarReason.MEMORY if memory else GrammarReason.TOO_LARGE
            answer = wire.Failed(request.id, reason, type(error).__name__)
        except Exception as error:  # noqa: BLE001  a process boundary: whatever xgrammar raises becomes an answer
            shown = " ".join(str(error).split())[:300]
            reason = GrammarReason.MEMORY if "bad_alloc" in shown else GrammarReason.FAILED
            answer = wire.Failed(request.id, reason, f"{type(error).__name__}: {shown}")
        send(wire.ANSWERS.encode(answer))
    return 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main(int(sys.argv[1])))
