"""The section `grammar` of the configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hemostat.config.fields import ExistingFolder, Section


class Grammar(Section):
    """Scoring of requests whose tokens a grammar restricts (structured output, forced tools); needs the extra
    `hemostat[grammar]`, and a reference that knows its whole vocabulary. Says how the upstream enforces grammars."""

    enabled: bool = True
    backend: Literal["auto", "xgrammar", "guidance", "outlines", "lm-format-enforcer"] = "auto"
    """`backend` of its --structured-outputs-config. Only grammars that xgrammar enforces can be rebuilt."""
    disable_any_whitespace: bool = False
    """The same of its --structured-outputs-config."""
    enable_in_reasoning: bool = False
    """The same: the grammar restricts reasoning, too."""
    tool_call_parser: str | None = Field(default=None, min_length=1, max_length=64)
    """Its --tool-call-parser, which decides what grammar forced and strict tools become; none: these are not scored."""
    tool_strict_level: Literal["auto", "function", "parameter"] = "auto"
    """Its --tool-strict-level."""
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = Field(default=[], max_length=64)
    """Ids at which it stops, besides those of the tokenizer, of generation_config.json and of requests."""
    tokenizer: ExistingFolder | None = None
    """Folder with the models' tokenizer; default: that of the reference's checkpoint."""
    seconds: float = Field(default=10.0, gt=0, le=600)
    """Longest time for one request's grammar; then it is skipped."""
    memory_mib: int = Field(default=1024, ge=64)
    """What the process that rebuilds grammars may allocate, besides its packages and tokenizers."""
