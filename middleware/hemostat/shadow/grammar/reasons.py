"""Why the ids that a grammar allows are not known."""

from __future__ import annotations

from enum import StrEnum


class GrammarReason(StrEnum):
    """Values of the label `reason` of skipped shadow requests."""

    NOT_READY = "grammar_not_ready"
    """The process that rebuilds grammars does not start, or ended and is started again."""
    NOT_INSTALLED = "grammar_not_installed"
    """A package that it needs is missing."""
    NO_TOKENIZER = "grammar_no_tokenizer"
    """There is no tokenizer on this machine, or xgrammar cannot use it."""
    REFUSED = "grammar_refused"
    """xgrammar refuses the grammar: vLLM enforces it by another backend, or differently."""
    OTHER_BACKEND = "grammar_other_backend"
    """The schema has a feature for which vLLM takes another backend than xgrammar."""
    TOOL_PARSER = "grammar_tool_parser"
    """`grammar.tool_call_parser` is not set, or the grammar that this parser makes of tools cannot be rebuilt."""
    COMBINED = "grammar_combined"
    """Both a structured output and strict tools: vLLM allows either."""
    INVALID = "grammar_invalid"
    """The members are not what vLLM takes."""
    TIMEOUT = "grammar_timeout"
    """Longer than `grammar.seconds`."""
    MEMORY = "grammar_memory"
    """More than `grammar.memory_mib`."""
    TOO_LARGE = "grammar_too_large"
    """The members, or the sets of allowed ids, are too large."""
    FAILED = "grammar_failed"
    """The process ended, or answered something unexpected."""
    MISMATCH = "grammar_mismatch"
    """An emitted id, or a listed one with a probability, is not allowed; or a listed one without is."""
    UNKNOWN = "grammar_unknown"
    """Listed ids have no probability, though nothing in the request restricts its tokens."""
    NEEDS_FULL_VOCABULARY = "grammar_needs_full_vocabulary"
    """The reference gives only its top ids: its distribution over the allowed ids does not follow from them."""


class GrammarFailure(Exception):
    """The allowed ids of one capture are not known, for `reason`."""

    def __init__(self, reason: GrammarReason, message: str = "") -> None:
        super().__init__(message or reason.value)
        self.reason = reason
