"""Images, audio, embeddings and beam search: relayed as they are, never treated, skipped by reason, and counted."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from tests.support.wire import VERSION, Wire, policy

from hemostat.ipc.messages import SampledCount
from hemostat.openai.routes import CHAT, COMPLETIONS, ROUTES, Support


def chat(part: dict[str, Any]) -> dict[str, Any]:
    content = [{"type": "text", "text": "What is it?"}, part]
    return {"model": "fake", "max_tokens": 4, "messages": [{"role": "user", "content": content}]}


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
AUDIO = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
PROMPT = {"model": "fake", "max_tokens": 4, "prompt": "Hi"}
ASKED = [{"role": "user", "content": "Hi"}]
BODIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "an image": ("multimodal", CHAT, chat(IMAGE)),
    "an image by its id": ("multimodal", CHAT, chat({"type": "image_url", "image_url": None, "uuid": "1"})),
    "an image of embeddings": ("multimodal", CHAT, chat({"type": "image_embeds", "image_embeds": "AAAA"})),
    "audio": ("multimodal", CHAT, chat(AUDIO)),
    "audio by its address": (
        "multimodal",
        CHAT,
        chat({"type": "audio_url", "audio_url": {"url": "http://localhost/a"}}),
    ),
    "a video": ("multimodal", CHAT, chat({"type": "video_url", "video_url": {"url": "http://localhost/v"}})),
    "an image in an earlier turn": (
        *("multimodal", CHAT),
        {**chat(IMAGE), "messages": [*chat(IMAGE)["messages"], {"role": "assistant", "content": "A cat."}, *ASKED]},
    ),
    "an image with own logprobs": ("multimodal", CHAT, {**chat(IMAGE), "logprobs": True, "top_logprobs": 5}),
    "an image with hidden reasoning": ("multimodal", CHAT, {**chat(IMAGE), "include_reasoning": False}),
    "an image with many choices": ("multimodal", CHAT, {**chat(IMAGE), "n": 17}),
    "an image with choices and tools": (
        *("multimodal", CHAT),
        {**chat(IMAGE), "n": 2, "tools": [{"type": "function", "function": {"name": "f"}}]},
    ),
    "embeddings of a prompt with its echo": (
        *("multimodal", COMPLETIONS),
        {**PROMPT, "prompt": None, "prompt_embeds": "AAAA", "echo": True, "logprobs": 5},
    ),
    "no messages, with own logprobs": (
        *("invalid", CHAT),
        {"model": "fake", "max_tokens": 4, "messages": [], "logprobs": True, "top_logprobs": 5},
    ),
    "embeddings of a prompt": ("multimodal", COMPLETIONS, {**PROMPT, "prompt": None, "prompt_embeds": "AAAA"}),
    "beam search in a chat": (
        *("beam_search", CHAT),
        {"model": "fake", "max_tokens": 4, "n": 2, "use_beam_search": True, "messages": ASKED},
    ),
    "beam search of a prompt": ("beam_search", COMPLETIONS, {**PROMPT, "n": 2, "use_beam_search": True}),
}


@pytest.mark.parametrize("case", BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_never_scored_is_relayed_as_it_is(wire: Wire, case: str, stream: bool) -> None:
    reason, path, body = BODIES[case]
    # Not by the engine's plugin, either.
    wire.interceptor.policy = policy(served=VERSION, control_fraction=0.0, tap=True, tap_tokens=True)
    data = msgspec.json.encode({**body, "stream": stream})
    assert wire.send(path, data).sent == data
    assert not wire.captures
    assert (wire.shadow("skipped", reason), wire.calibration("none", reason)) == (1, 1)
    counts = wire.tally.take()
    assert counts is not None
    [count] = counts.counts
    assert (count.outcome, count.reason, count.requests) == ("skipped", reason, 1.0)
    assert count.kind.startswith("chat" if path == CHAT else "completions")


NOT_SCORED = [route.path for route in ROUTES if route.support is Support.NOT_SCORED]


def test_the_routes_of_embeddings_and_audio_are_among_those_that_are_not_scored() -> None:
    assert {"/v1/embeddings", "/v1/audio/transcriptions", "/v1/audio/translations"} <= set(NOT_SCORED)


@pytest.mark.parametrize("path", NOT_SCORED)
def test_a_route_that_is_not_scored_is_relayed_unread(wire: Wire, path: str) -> None:
    wire.interceptor.policy = policy(served=VERSION, control_fraction=0.0)
    data = b'{"model": "fake", "input": "Hi"}'
    assert wire.send(path, data).sent == data
    assert wire.shadow("skipped", "route") == 1
    counts = wire.tally.take()
    assert counts is not None
    assert counts.counts == [SampledCount("", "skipped", "route", 1.0, 1.0, 0)]
