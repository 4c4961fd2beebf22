"""Reads a client's body into a `Request`: this module reads what all forms have in common, and the form reads the
rest.
"""

from __future__ import annotations

from hemostat.metrics.reasons import Unscored
from hemostat.openai.complexity import check_complexity
from hemostat.openai.forms.table import FORMATS
from hemostat.openai.json_splice import JsonObject
from hemostat.openai.model_name import is_version
from hemostat.openai.parameters import check_sampling, uncalibrated
from hemostat.openai.requests import FROM_TAP, Request, Uncalibrated
from hemostat.openai.routes import Form
from hemostat_calibration.engine_keys import MAC_KEY, PROFILE_KEY, SHADOW_KEY, acts


def read_request(
    data: bytes,
    *,
    form: Form,
    unscorable_models: frozenset[str] = frozenset(),
    scorable_models: frozenset[str] | None = None,
    default_model: str = "",
    adapter_names: bool = False,
    grammars: bool = True,
) -> Request:
    """Returns the request in a client's body. Raises one of MALFORMED if it is not an object with distinct keys, and of
    these TooComplex if parsing it would take too long.

    unscorable_models: adapters for which the reference has no counterpart.
    scorable_models: names that are compared with a matched reference; None: not known, no name is excluded.
    default_model: the name of the model that answers a request without one.
    adapter_names: a name that is a profile's version is an adapter of Hemostat's.
    grammars: requests whose tokens a grammar restricts can be scored.
    """
    check_complexity(data)
    body = JsonObject(data)
    model = body.value("model")
    name = model if isinstance(model, str) and model else default_model
    details = FORMATS[form].read(body)
    if model is not None and not isinstance(model, str):
        unscorable: Unscored | None = Unscored.INVALID
    elif adapter_names and is_version(name) and name not in (scorable_models or ()):
        unscorable = Unscored.LORA
    else:
        unscorable = _unscorable_model(name, unscorable_models, scorable_models) or details.unscorable
    check_sampling(body)
    xargs = body.value("vllm_xargs")
    if xargs is not None and not isinstance(xargs, dict):
        unscorable = Unscored.INVALID
    xargs = xargs if isinstance(xargs, dict) else {}
    if xargs.get(SHADOW_KEY) == "off":
        unscorable = Unscored.OPTED_OUT
    grammar = FORMATS[form].restricts_tokens(body)
    if grammar and not grammars and (unscorable is None or unscorable in FROM_TAP):
        unscorable = Unscored.GRAMMAR
    client_profile = xargs.get(PROFILE_KEY)
    key = details.conversation
    return Request(
        form=form,
        body=body,
        model=name,
        stream=body.value("stream") is True,
        usage_requested=details.usage_requested,
        tools=body.has("tools"),
        unscorable=unscorable,
        uncalibrated=Uncalibrated.OWN_XARGS if client_profile is not None else uncalibrated(body, unscorable),
        client_profile=client_profile if isinstance(client_profile, str) else None,
        client_acts=acts(xargs) or MAC_KEY in xargs,
        conversation_key=None if key is None else b"\x00".join([body.raw("model"), key]),
        messages=details.messages,
        min_prompt_tokens=details.min_prompt_tokens,
        choices=details.choices,
        prompts=details.prompts,
        requested=details.requested,
        grammar=grammar,
        ids_only=details.ids_only and unscorable is details.unscorable and not grammar,
    )


def _unscorable_model(model: str, adapters: frozenset[str], scorable: frozenset[str] | None) -> Unscored | None:
    if not model:
        return None
    if model in adapters:
        return Unscored.LORA
    return None if scorable is None or model in scorable else Unscored.NO_REFERENCE
