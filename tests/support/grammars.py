"""What rebuilds grammars, for tests of what uses it."""

from __future__ import annotations

from collections.abc import Callable

from hemostat.config.grammar import Grammar
from hemostat.openai.grammar_spec import GrammarSpec
from hemostat.shadow.grammar.conditioning import Conditioning
from hemostat.shadow.grammar.masks import Tokenizer
from hemostat.shadow.grammar.reasons import GrammarFailure, GrammarReason
from hemostat_calibration.allowed_sets import AllowedSets
from hemostat_calibration.arrays import Ids


class NoSets:
    """Rebuilds nothing."""

    def ready(self, tokenizer: Tokenizer) -> bool:
        return True

    async def sets(self, spec: GrammarSpec, output: Ids, start: int, tokenizer: Tokenizer) -> AllowedSets:
        raise GrammarFailure(GrammarReason.NOT_INSTALLED)


class GivenSets:
    """Gives what a function of the output says."""

    def __init__(self, make: Callable[[GrammarSpec, Ids], AllowedSets]) -> None:
        self._make = make
        self.starts: list[int] = []

    def ready(self, tokenizer: Tokenizer) -> bool:
        return True

    async def sets(self, spec: GrammarSpec, output: Ids, start: int, tokenizer: Tokenizer) -> AllowedSets:
        self.starts.append(start)
        return self._make(spec, output)


def no_conditioning() -> Conditioning:
    return Conditioning(Grammar(), NoSets())
