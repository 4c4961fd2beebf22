"""The model of the fake vLLM: tokens, the chat template, a distribution after every context, and what is sampled."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
from tests.support.fake_lora import FakeLora
from tests.support.fake_vllm.answers import RefusedError

from hemostat_calibration import __version__
from hemostat_calibration.engine_keys import is_signed

VOCAB = 512
IM_START, EOS = 256, 257
"""Ids below 256 are bytes, those above 257 are words."""


def token_bytes(token: int) -> bytes:
    if token < 256:
        return bytes([token])
    return {IM_START: b"<|im_start|>", EOS: b"<|im_end|>"}.get(token, b" w%d" % token)


def encode(text: str) -> list[int]:
    return list(text.encode())


def render(messages: list[dict[str, Any]]) -> list[int]:
    """The chat template: a marker, the role and the text of every message."""
    ids: list[int] = []
    for message in messages:
        content = message.get("content") or ""
        if isinstance(content, list):
            content = "\n".join(part.get("text", "") for part in content)
        ids += [IM_START, *encode(f"{message['role']}\n{content}"), EOS]
    return [*ids, IM_START, *encode("assistant\n")]


@dataclass(frozen=True, slots=True)
class Step:
    """One engine step: one token."""

    token: int
    logprobs: npt.NDArray[np.float64]
    text: str
    """What is new in the text; held back while a stop string or a character is incomplete."""
    finish: str | None
    stop_reason: str | None


@lru_cache(4096)
def drawn_logits(seed: int, noise: float, vocab_size: int, key: bytes) -> npt.NDArray[np.float64]:
    """float64 [vocab_size]: for the key of a context. noise: see `FakeModel`."""

    def normal(purpose: bytes) -> npt.NDArray[np.float64]:
        digest = blake2b(key, digest_size=16, key=seed.to_bytes(8, "little"), person=purpose).digest()
        return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little"))).standard_normal(vocab_size)

    logits = 3.0 * normal(b"model")
    logits[:IM_START] -= 4.0
    if noise:
        logits += noise * normal(b"noise")
    return logits


def normalized(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Returns log-probabilities, rounded to float32 as in the engine, so that JSON carries what was computed."""
    logprobs: npt.NDArray[np.float32] = (logits - np.log(np.exp(logits).sum())).astype(np.float32)
    return logprobs.astype(np.float64)


@lru_cache(4096)
def drawn_logprobs(seed: int, noise: float, vocab_size: int, key: bytes) -> npt.NDArray[np.float64]:
    """Returns the `normalized` `drawn_logits`. Callers share the array, so that nobody may write to it."""
    logprobs = normalized(drawn_logits(seed, noise, vocab_size, key))
    logprobs.flags.writeable = False
    return logprobs


@dataclass
class FakeModel:
    """seed: the model. noise: how far this model's logits stand off those of the same seed without noise."""

    seed: int = 0
    noise: float = 0.0
    model: str = "fake"
    lora: FakeLora | None = None
    """Adapters that are loaded at run time, in addition to `adapters`, which change nothing but the name."""
    aliases: tuple[str, ...] = ()
    """Further names of the model."""
    vocab_size: int = VOCAB
    raw_logprobs: bool = True
    """Off: logprobs are reported after logit_bias, as another --logprobs-mode does."""
    plugin: bool = False
    """Hemostat's logits processor is loaded: it refuses what is not a profile version, and forces tokens."""
    plugin_version: str = __version__
    """The version that the plugin says in its refusals; "": an older plugin, which says none."""
    kv_precision: int = 94
    """The number that the plugin gives for the precision of the KV cache."""
    secret: str | None = None
    """The secret of the control process, under which acting keys have to be signed; None: a plugin that acts on all."""
    fault: str = ""
    """Where 0.5 nats of noise are added: "prefix", to what is decoded behind a cached prompt; "batch", beside other
    requests; "decoding", but not in a prefill."""
    running: int = 0
    """Generations in progress."""
    salts: set[str] = field(default_factory=set)
    """Of what was decoded so far: the prefix cache has its prompts."""
    chat_template: str | None = ""
    """Text in front of every rendered chat; None: the model has no chat template."""
    default_temperature: float = 1.0
    """The temperature of requests that name none."""

    def answers_as(self, body: dict[str, Any]) -> str:
        """What the answer names as its model: whichever name of the base model was asked for, its first."""
        name = body.get("model") or self.model
        return self.model if name in self.aliases else str(name)

    def logprobs(
        self, context: list[int], adapter: str | None = None, noise: float | None = None
    ) -> npt.NDArray[np.float64]:
        """float64 [VOCAB], nats: what comes after these tokens. adapter: one of `lora`. noise: default the model's."""
        noise = self.noise if noise is None else noise
        drawn = self.seed, noise, self.vocab_size, np.asarray(context[-4:], "<i4").tobytes()
        if adapter is None or self.lora is None:
            return drawn_logprobs(*drawn)
        return normalized(drawn_logits(*drawn) + self.lora.effect(adapter, context, self.vocab_size))

    def row_logprobs(
        self, context: list[int], body: dict[str, Any], *, decodes: bool = False
    ) -> npt.NDArray[np.float64]:
        """The same for a request: with the adapter that it names. decodes: of a token that is generated."""
        adapter = None if self.lora is None else self.lora.applied(self.answers_as(body))
        return self.logprobs(context, adapter, *([self.noise + 0.5] if self._fails(body, decodes) else []))

    def _fails(self, body: dict[str, Any], decodes: bool) -> bool:
        """Whether `fault` is in this request's way now."""
        reads_cache = "prompt_logprobs" not in body
        return {
            "": False,
            "prefix": reads_cache and decodes and body.get("cache_salt") in self.salts,
            "batch": self.running > 1,
            "decoding": decodes,
        }[self.fault]

    def acts_on(self, xargs: dict[str, Any]) -> bool:
        """Returns True if the plugin takes the acting keys for the control process's."""
        return self.plugin and (self.secret is None or is_signed(xargs, [self.secret]))

    def _forced(self, body: dict[str, Any]) -> list[int]:
        """The first tokens of the output, as the plugin has them."""
        xargs = (body.get("vllm_xargs") or {}) if self.plugin else {}
        if not self.acts_on(xargs):
            return []
        return [self.kv_precision] if "hemostat_kv_precision" in xargs else xargs.get("hemostat_force", [])

    def encode(self, text: str) -> list[int]:
        return encode(text)

    def render(self, messages: list[dict[str, Any]]) -> list[int]:
        if self.chat_template is None:
            raise RefusedError("default chat template is no longer allowed, so you must provide a chat template", None)
        return [*encode(self.chat_template), *render(messages)]

    @staticmethod
    def biased(logprobs: npt.NDArray[np.float64], body: dict[str, Any]) -> npt.NDArray[np.float64]:
        biased = logprobs.copy()
        for token, bias in (body.get("logit_bias") or {}).items():
            biased[int(token)] += bias
        return biased

    def _sample(self, logprobs: npt.NDArray[np.float64], body: dict[str, Any], position: int) -> int:
        temperature = self.default_temperature if body.get("temperature") is None else body["temperature"]
        biased = self.biased(logprobs, body)
        if temperature:
            seed = (self.seed, body.get("seed") or 0, position)
            biased = biased / temperature + np.random.default_rng(seed).gumbel(size=self.vocab_size)
        return int(biased.argmax())

    def steps(self, prompt: list[int], body: dict[str, Any], limit: int) -> Iterator[Step]:
        text_of_prompt = bytes(token for token in prompt if token < 256).decode(errors="replace")
        script: Iterator[int] | None = None
        if "say: " in text_of_prompt:
            said = text_of_prompt.rpartition("say: ")[2].removesuffix("assistant\n")
            script = iter([*encode(said), EOS])
        stops = body.get("stop") or []
        stops = [stops] if isinstance(stops, str) else stops
        hold = max((len(stop) for stop in stops), default=1) - 1
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        context, text, sent, forced = list(prompt), "", 0, self._forced(body)
        for position in range(1, limit + 1):
            logprobs = self.row_logprobs(context, body, decodes=True)
            if position <= len(forced):
                token = forced[position - 1]
            else:
                token = next(script) if script is not None else self._sample(logprobs, body, position)
            context.append(token)
            finish: str | None = None
            stop_reason: str | None = None
            if token == EOS and not body.get("ignore_eos"):
                finish = "stop"
            else:
                text += decoder.decode(token_bytes(token))
                result = [(text.find(stop), stop) for stop in stops if stop in text]
                if result:
                    end, stop_reason = min(result)
                    text, finish = text[:end], "stop"
                elif position == limit:
                    finish = "length"
            end = len(text) if finish else max(sent, len(text) - hold)
            reported = logprobs if self.raw_logprobs else self.biased(logprobs, body)
            if not self.raw_logprobs and position <= len(forced):
                reported = np.where(np.arange(self.vocab_size) == token, 0.0, -np.inf)
            yield Step(token, reported, text[sent:end], finish, stop_reason)
            sent = end
            if finish:
                return
