"""Whether a request that a grammar restricts can be scored. Runs in the relays: it compiles nothing."""

from __future__ import annotations

from dataclasses import replace

from hemostat.ipc.messages import Policy
from hemostat.openai.grammar_spec import GrammarOrigin
from hemostat.openai.requests import Request, Unscorable


def with_scorable_grammar(request: Request, policy: Policy) -> Request:
    """The request, as one that cannot be scored where its grammar cannot be rebuilt."""
    if request.grammar is None:
        return request
    of_tools = request.grammar.origin is not GrammarOrigin.STRUCTURED_OUTPUT
    if policy.tool_grammars if of_tools else policy.grammars:
        return request
    return replace(request, unscorable=Unscorable.FORCED_TOOL if of_tools else Unscorable.STRUCTURED_OUTPUT)
