"""Whatever JSON a client sends as its request: the hook does not fail, and what it cannot read goes on untouched."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.support.slow import examples
from tests.support.wire import TOOLS, VERSION, Wire, chat, completion, policy

from hemostat.hooks import Refusal, Rewrite
from hemostat.openai.json_splice import JsonObject
from hemostat.openai.routes import CHAT, COMPLETIONS

POLICIES = {
    "sampled": policy(),
    "calibrated": policy(served=VERSION, control_fraction=0.0, treat_unjudged=True),
    "from the plugin": policy(served=VERSION, tap=True, tap_tokens=True, grammars=True),
    "an adapter": policy(
        served=VERSION,
        adapters=frozenset({VERSION}),
        base_models=frozenset({"fake"}),
        scorable_models=frozenset({"fake", "b"}),
        calibrated_models=frozenset({"fake"}),
        unscorable_models=frozenset({"lora"}),
        adapter_names=True,
        default_model="fake",
        answered_name="fake",
        grammars=True,
    ),
}
OTHER_FORMS = {
    "/v1/responses": {"model": "fake", "input": "x", "max_output_tokens": 5},
    "/v1/messages": {"model": "fake", "messages": [{"role": "user", "content": "x"}], "max_tokens": 5},
}
BODIES = {CHAT: chat(), COMPLETIONS: completion(), **OTHER_FORMS}
KEYS = (
    *("model", "messages", "prompt", "input", "stream", "stream_options", "n", "tools", "tool_choice", "logprobs"),
    *("top_logprobs", "return_token_ids", "return_tokens_as_token_ids", "vllm_xargs", "temperature", "top_p", "top_k"),
    *("min_p", "repetition_penalty", "logit_bias", "presence_penalty", "frequency_penalty", "bad_words", "thinking"),
    *("allowed_token_ids", "min_tokens", "max_tokens", "max_completion_tokens", "max_output_tokens", "watermarking"),
    *("response_format", "structured_outputs", "parallel_tool_calls", "include_reasoning", "echo", "use_beam_search"),
    *("guided_json", "prompt_embeds", "logits_processors", "thinking_token_budget", "system", "instructions", "text"),
    *("previous_response_id", "background", "store", "include", "reasoning", "cache_salt", "stop_token_ids", "user"),
)
NUMBERS = st.sampled_from(["0.1e3081", "-1e999", "1" * 400, "1e-9999", "-0", "1e400", "9" * 25, "0.5", "1", "0", "-1"])
TEXTS = st.sampled_from(['""', '"x"', '"fake"', f'"{VERSION}"', '"lora"', '"\\ud800"', '"auto"', '"required"', '"5"'])
SCALARS = NUMBERS | TEXTS | st.sampled_from(["null", "true", "false", "[]", "{}", "[[]]", '[{"type":1}]', "[null]"])
VALUES = st.recursive(
    SCALARS | st.just(json.dumps(TOOLS)),
    lambda inner: (
        st.lists(inner, max_size=2).map(lambda items: "[" + ",".join(items) + "]")
        | st.dictionaries(
            st.sampled_from([*KEYS, "role", "content", "type", "hemostat", "hemostat_tap", "include_usage", "strict"]),
            inner,
            max_size=3,
        ).map(lambda items: "{" + ",".join(f'"{key}":{value}' for key, value in items.items()) + "}")
    ),
    max_leaves=5,
)


def written(base: dict[str, Any], changes: dict[str, str]) -> bytes:
    """changes: JSON, which may not be what Python's writer would write."""
    members = {key: json.dumps(value) for key, value in base.items()} | changes
    return ("{" + ",".join(f'"{key}":{value}' for key, value in members.items()) + "}").encode()


def asked(name: str, path: str, body: bytes) -> Rewrite | Refusal | None:
    """What the hook does with a request. It must not raise."""
    wire = Wire(httpx.Client())
    wire.interceptor.policy = POLICIES[name]
    exchange = wire.interceptor.begin("POST", path.encode(), [], "r")
    assert exchange is not None
    assert not isinstance(exchange, Refusal)
    result = exchange.request(body)
    assert exchange.arm
    assert exchange.comparison is None or exchange.comparison.kind
    exchange.closed(complete=False)
    return result


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=examples(40))
@given(path=st.sampled_from(sorted(BODIES)), changes=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
@example(path=CHAT, changes={"model": "[]"})
@example(path=CHAT, changes={"vllm_xargs": "[]"})
@example(path=CHAT, changes={"vllm_xargs": '""'})
@example(path=CHAT, changes={"min_p": "0.1e3081"})
@example(path=COMPLETIONS, changes={"top_k": "1" * 400})
@example(path=CHAT, changes={"model": "[]", "repetition_penalty": "0.1e3081"})
def test_no_request_makes_the_hook_fail(name: str, path: str, changes: dict[str, str]) -> None:
    body = written(BODIES[path], changes)
    result = asked(name, path, body)
    if isinstance(result, Rewrite):
        # What was added is in an object of which every other member is as it was.
        before, after = JsonObject(body), JsonObject(result.body)
        added = {"logprobs", "top_logprobs", "return_token_ids", "return_tokens_as_token_ids", "stream_options"}
        for key in (
            json.loads(body, parse_int=str, parse_float=str).keys()
            - added
            - {*("vllm_xargs", "model", "temperature", "logit_bias")}
        ):
            assert after.raw(key) == before.raw(key)


@pytest.mark.parametrize(
    ("member", "value"), [("model", "[]"), ("vllm_xargs", "[]"), ("vllm_xargs", '""'), ("min_p", "0.1e3081")]
)
@pytest.mark.parametrize("name", POLICIES)
def test_what_the_engine_refuses_in_any_case_is_forwarded_unchanged(name: str, member: str, value: str) -> None:
    assert asked(name, CHAT, written(chat(), {member: value})) is None
