"""Messages between the control process and the grammar worker, over the worker's standard input and output."""

from __future__ import annotations

import msgspec

from hemostat.ipc.codec import MessageCodec
from hemostat.openai.grammar_spec import GrammarSpec
from hemostat.shadow.grammar.reasons import GrammarReason


class Prepare(msgspec.Struct, tag="prepare", frozen=True):
    """Load the tokenizer of one model."""

    id: int
    folder: str
    vocab_size: int
    """V of the model's logits, and of the masks."""
    memory_mib: int
    """Data that the process may allocate from then on."""


class Walk(msgspec.Struct, tag="walk", frozen=True):
    """The sets along one output."""

    id: int
    folder: str
    vocab_size: int
    """Of a model that is prepared."""
    spec: GrammarSpec
    output: bytes
    """int32 [T]"""
    start: int
    """Index of the first position that the grammar restricts; all ids are allowed before."""
    parser: str
    """The server's `--tool-call-parser`; "" where that is not known."""
    strict_level: str
    any_whitespace: bool
    stop_token_ids: list[int]
    """Those that the operator names, besides the model's and the request's own."""


class Prepared(msgspec.Struct, tag="prepared", frozen=True):
    id: int


class Walked(msgspec.Struct, tag="walked", frozen=True):
    id: int
    table: bytes
    """uint32 [sets, words]"""
    rows: bytes
    """int32 [T]"""


class Failed(msgspec.Struct, tag="failed", frozen=True):
    id: int
    reason: GrammarReason
    message: str


Request = Prepare | Walk
Answer = Prepared | Walked | Failed

REQUESTS: MessageCodec[Request] = MessageCodec(Request)
ANSWERS: MessageCodec[Answer] = MessageCodec(Answer)
