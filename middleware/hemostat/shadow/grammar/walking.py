"""Walks a grammar along an output with xgrammar, as vLLM 0.32 does (`v1/structured_output/backend_xgrammar.py`)."""

from __future__ import annotations

import json
from collections.abc import Set
from pathlib import Path
from typing import Any

import numpy as np
import xgrammar as xgr

from hemostat.shadow.grammar.constraints import Constraint, ConstraintType
from hemostat.shadow.grammar.reasons import GrammarFailure, GrammarReason
from hemostat_calibration.allowed_sets import WORD_BITS, AllowedSets, words
from hemostat_calibration.arrays import Ids

MAX_TABLE_BYTES = 32 * 1024 * 1024
"""Of the distinct sets of one output."""


class TokenizerGrammars:
    """Compiles grammars for one tokenizer. cache_bytes: of compiled grammars that are kept."""

    def __init__(self, folder: Path, vocab_size: int, cache_bytes: int) -> None:
        """GrammarFailure where there is no tokenizer that xgrammar can use."""
        from transformers import AutoTokenizer  # noqa: PLC0415  slow to import

        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
            info = xgr.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size)
        except Exception as error:
            raise GrammarFailure(GrammarReason.NO_TOKENIZER, f"{folder}: {one_line(error)}") from error
        self.vocab_size = vocab_size
        self.stop_token_ids = frozenset(_stop_token_ids(folder, tokenizer))
        # One thread: it yields to whatever serves clients on this machine.
        self._compiler = xgr.GrammarCompiler(info, max_threads=1, cache_enabled=True, cache_limit_bytes=cache_bytes)

    def compile(self, constraint: Constraint, *, any_whitespace: bool) -> Any:
        """GrammarFailure where xgrammar refuses it."""
        text, compiler = constraint.text, self._compiler
        try:
            match constraint.type:
                case ConstraintType.JSON:
                    separators = None if any_whitespace else (",", ":")
                    return compiler.compile_json_schema(text, any_whitespace=any_whitespace, separators=separators)
                case ConstraintType.REGEX:
                    return compiler.compile_regex(text)
                case ConstraintType.GRAMMAR:
                    return compiler.compile_lark(text) if is_lark(text) else compiler.compile_grammar(text)
                case ConstraintType.STRUCTURAL_TAG:
                    return self._compile_tag(text)
        except Exception as error:
            shown = one_line(error)
            out_of_memory = isinstance(error, MemoryError) or "bad_alloc" in shown
            reason = GrammarReason.MEMORY if out_of_memory else GrammarReason.REFUSED
            raise GrammarFailure(reason, shown) from error

    def _compile_tag(self, text: str) -> Any:
        tag = json.loads(text)
        if "structures" not in tag:
            return self._compiler.compile_structural_tag(text)
        items = [
            xgr.StructuralTagItem(begin=s["begin"], schema=json.dumps(s["schema"]), end=s["end"])
            for s in tag["structures"]
        ]
        return self._compiler.compile_structural_tag(items, tag["triggers"])

    def walk(self, compiled: Any, output: Ids, start: int, stop_token_ids: Set[int]) -> AllowedSets:
        """The allowed ids at each position of `output` [T]: all of them before `start`, and after the grammar has
        ended. GrammarFailure where the output is not of the grammar, or its sets are too large."""
        matcher = xgr.GrammarMatcher(compiled, override_stop_tokens=sorted(stop_token_ids) or None)
        width, mask = words(self.vocab_size), xgr.allocate_token_bitmask(1, self.vocab_size)
        bits = mask.numpy().view(np.uint32)[0]
        every = np.full(width, 0xFFFFFFFF, np.uint32)
        used = self.vocab_size % WORD_BITS
        last = np.uint32((1 << used) - 1 if used else 0xFFFFFFFF)
        found: dict[bytes, int] = {}
        rows = np.empty(len(output), np.int32)
        ended = False
        for t, token in enumerate(output.tolist()):
            free = t < start or ended
            if free:
                bits[:] = every
            else:
                # It returns False, and leaves the mask, where every id is allowed.
                bits[:] = every
                matcher.fill_next_token_bitmask(mask, 0)
            bits[-1] &= last
            rows[t] = found.setdefault(bits.tobytes(), len(found))
            if len(found) * width * 4 > MAX_TABLE_BYTES:
                raise GrammarFailure(GrammarReason.TOO_LARGE, f"more than {MAX_TABLE_BYTES} bytes of sets")
            if free:
                continue
            if not matcher.accept_token(token):
                raise GrammarFailure(GrammarReason.MISMATCH, f"the grammar does not allow the id at position {t}")
            ended = matcher.is_terminated()
        table = np.frombuffer(b"".join(found), np.uint32).reshape(-1, width)
        return AllowedSets(self.vocab_size, table, rows)


def is_lark(grammar: str) -> bool:
    """Whether vLLM takes a grammar for one in Lark's syntax (`v1/structured_output/utils.py`)."""
    for line in grammar.split("\n"):
        code = line
        for mark in ("#", "//"):
            code = code.partition(mark)[0]
        if "::=" in code:
            return False
    return bool(grammar)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _stop_token_ids(folder: Path, tokenizer: Any) -> list[int]:
    """What vLLM stops at by itself: the tokenizer's end token, and those of the model's generation_config."""
    found = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    path = folder / "generation_config.json"
    if path.is_file():
        try:
            named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise GrammarFailure(GrammarReason.NO_TOKENIZER, f"{path}: {one_line(error)}") from error
        found += named if isinstance(named, list) else [] if named is None else [named]
    return found
