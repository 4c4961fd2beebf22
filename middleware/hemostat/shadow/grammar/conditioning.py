"""From a capture to what its grammar allowed: the sets, and the candidates that are in them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

from hemostat.config.grammar import Grammar
from hemostat.ipc.messages import Capture
from hemostat.openai.grammar_spec import GrammarSpec
from hemostat.reference.protocol import ReferenceInfo
from hemostat.shadow.grammar.checking import restricted, shows_mask
from hemostat.shadow.grammar.masks import Tokenizer
from hemostat.shadow.grammar.reasons import GrammarFailure, GrammarReason
from hemostat.shadow.record_builder import CaptureArrays
from hemostat_calibration.allowed_sets import AllowedSets
from hemostat_calibration.arrays import Ids
from hemostat_calibration.reasoning import Markers, end_of_thinking


class SetSource(Protocol):
    """Of `hemostat.shadow.grammar.masks.GrammarMasks`."""

    def ready(self, tokenizer: Tokenizer) -> bool: ...

    async def sets(self, spec: GrammarSpec, output: Ids, start: int, tokenizer: Tokenizer) -> AllowedSets: ...


class Conditioning:
    """Conditions captures on their grammars."""

    def __init__(self, settings: Grammar, source: SetSource) -> None:
        self._settings = settings
        self._source = source

    def ready(self, capture: Capture, info: ReferenceInfo | None) -> bool:
        """Whether nothing has to be waited for; a failure is nothing that one waits for."""
        if capture.grammar is None or info is None or (tokenizer := self._tokenizer(info)) is None:
            return True
        return self._source.ready(tokenizer)

    async def condition(
        self, capture: Capture, arrays: CaptureArrays, info: ReferenceInfo, markers: Markers | None = None
    ) -> tuple[CaptureArrays, AllowedSets | None]:
        """The arrays with the allowed candidates only, and the sets; as they are, and None, where nothing restricts the
        request. GrammarFailure where the sets are not known, or something restricted it that is not known.

        markers: of the served model's thinking, which vLLM does not restrict where it runs a reasoning parser. That it
        runs none, though its tokenizer has the markers, shows where the sets agree with its list from the beginning
        only.
        """
        if capture.grammar is None:
            if shows_mask(arrays.candidates):
                raise GrammarFailure(GrammarReason.UNKNOWN)
            return arrays, None
        if not info.full_vocabulary:
            raise GrammarFailure(GrammarReason.NEEDS_FULL_VOCABULARY)
        tokenizer = self._tokenizer(info)
        if tokenizer is None:
            raise GrammarFailure(GrammarReason.NO_TOKENIZER, "set grammar.tokenizer")
        start = 0
        hidden = capture.grammar.members.get("include_reasoning") == b"false"
        if markers is not None and not hidden and not self._settings.enable_in_reasoning:
            start = end_of_thinking(arrays.prompt, arrays.whole_output, markers)
        try:
            return await self._conditioned(capture, capture.grammar, arrays, start, tokenizer)
        except GrammarFailure as failure:
            if start == 0 or failure.reason is not GrammarReason.MISMATCH:
                raise
            return await self._conditioned(capture, capture.grammar, arrays, 0, tokenizer)

    async def _conditioned(
        self, capture: Capture, grammar: GrammarSpec, arrays: CaptureArrays, start: int, tokenizer: Tokenizer
    ) -> tuple[CaptureArrays, AllowedSets]:
        """start: of the first output position that is restricted."""
        sets = await self._source.sets(grammar, arrays.whole_output, start, tokenizer)
        sets = AllowedSets(sets.vocab_size, sets.table, sets.rows[arrays.position :])
        candidates = restricted(arrays.candidates, arrays.output, capture.top_k, sets)
        return replace(arrays, candidates=candidates), sets

    def _tokenizer(self, info: ReferenceInfo) -> Tokenizer | None:
        folder: Path | None = self._settings.tokenizer or info.folder
        return None if folder is None else Tokenizer(folder, info.vocab_size)
