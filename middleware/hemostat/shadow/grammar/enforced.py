"""What the server enforces on a request, and whether that can be scored. Runs in the relays: it compiles nothing."""

from __future__ import annotations

from dataclasses import replace

from hemostat.ipc.messages import Policy
from hemostat.openai.form import Form
from hemostat.openai.grammar_spec import GrammarOrigin, GrammarTooLarge, read_grammar
from hemostat.openai.json_splice import MALFORMED
from hemostat.openai.requests import Request, Unscorable

_FORMS = frozenset({Form.CHAT, Form.COMPLETIONS})
"""Those whose grammar is read here."""


def with_grammar(request: Request, policy: Policy) -> Request:
    """The request with its grammar, or with why it cannot be scored under that."""
    if request.form not in _FORMS:
        return request
    try:
        found = read_grammar(request.body, tools=request.form is Form.CHAT, free_calls=policy.free_calls)
    except GrammarTooLarge:
        return replace(request, unscorable=Unscorable.GRAMMAR_TOO_LARGE)
    except MALFORMED:
        return replace(request, unscorable=Unscorable.INVALID)
    if found is None:
        return request
    of_tools = found.origin is not GrammarOrigin.STRUCTURED_OUTPUT
    unscorable = request.unscorable
    if not (policy.tool_grammars if of_tools else policy.grammars):
        unscorable = Unscorable.FORCED_TOOL if of_tools else Unscorable.STRUCTURED_OUTPUT
    return replace(request, grammar=found, unscorable=unscorable)
