"""A pooling server's `/pooling`: final hidden states of a model whose logits are W h, and the checkpoint with its W.

The model knows the text of the probe: its next token follows from the last one as it does there. So its likelihood of
that text is a language model's.
"""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from tests.support.fake_vllm.answers import Receive, RefusedError, Send, disconnected, start

PIECE = 1 << 20


def bfloat16(values: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """The bits of the nearest bfloat16."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def as_float(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@dataclass
class FakePooling:
    """text: what the model knows. vocab_size: V; d is the same. bias, scale, soft_cap: what follows W h, beside
    `config`. Faults may be set at any time."""

    text: str
    vocab_size: int = 512
    bias: bool = False
    scale: float = 1.0
    soft_cap: float | None = None
    revision: int = 0
    """Another one has other hidden states."""
    noise: float = 0.0
    """Relative size of what is different in every answer."""
    normalized: bool = False
    short: bool = False
    """Leave out the last position."""
    endless: int = 0
    """Send that many bytes."""
    bomb: bool = False
    """Send them compressed."""
    hang: bool = False
    slow: float = 0.0
    """Seconds before each byte."""
    status: int | None = None
    task: str = "token_embed"
    not_finite: bool = False
    answered: int = 0
    sent: int = 0
    """Bytes of the last body that were handed to the connection while the client was there."""
    weight: npt.NDArray[np.float32] = field(init=False)
    """[V, d]"""

    def __post_init__(self) -> None:
        ids = list(self.text.encode())
        counts = np.full((self.vocab_size, self.vocab_size), 0.02)
        for before, after in itertools.pairwise(ids):
            counts[before, after] += 8.0
        logits = np.log(counts / counts.sum(1, keepdims=True))
        rng = np.random.default_rng(1)
        self._bias = as_float(bfloat16(rng.normal(0, 0.3, self.vocab_size))) if self.bias else None
        wanted = logits / self.scale
        if self.soft_cap is not None:
            wanted = wanted - wanted.mean(1, keepdims=True)
            wanted = self.soft_cap * np.arctanh(np.clip(wanted / self.soft_cap, -0.98, 0.98))
        if self._bias is not None:
            wanted = wanted - self._bias
        self.weight = as_float(bfloat16(wanted.T / 4.0))

    def save(self, folder: Path, *, tied: bool = False, padding: int = 0, **config: Any) -> Path:
        """The checkpoint of this model: config.json and one safetensors file, in bfloat16 by its bits."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = np.concatenate([self.weight, np.ones((padding, self.weight.shape[1]), np.float32)])
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        tensors = {name: bfloat16(rows), "model.norm.weight": bfloat16(np.ones(self.vocab_size, np.float32))}
        if self._bias is not None:
            tensors["lm_head.bias"] = bfloat16(self._bias)
        data = bytearray(safetensors.numpy.save(tensors))
        length = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + length].replace(b'"U16"', b'"BF16"')
        (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
        known = {"model_type": "fake", "vocab_size": self.vocab_size, "tie_word_embeddings": tied} | config
        if self.scale != 1.0:
            known.setdefault("logit_scale", self.scale)
        if self.soft_cap is not None:
            known.setdefault("final_logit_softcapping", self.soft_cap)
        (folder / "config.json").write_text(json.dumps(known))
        return folder

    def states(self, ids: list[int]) -> npt.NDArray[np.uint16]:
        """[n, d]: 4 at the last id, and a little that depends on the last four."""
        rows = np.zeros((len(ids), self.vocab_size), np.float32)
        for n in range(len(ids)):
            key = np.asarray([self.revision, *ids[max(0, n - 3) : n + 1]], "<i4").tobytes()
            seed = int.from_bytes(blake2b(key, digest_size=8).digest(), "little")
            rows[n] = np.random.default_rng(seed).normal(0, 0.002 if not self.revision else 0.1, self.vocab_size)
            rows[n, ids[n]] += 4.0
        if self.noise:
            rows *= 1 + self.noise * np.random.default_rng(self.answered).standard_normal(rows.shape)
        if self.normalized:
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        if self.not_finite:
            rows[-1, 0] = np.nan
        return bfloat16(rows)

    def logprobs(self, ids: list[int]) -> npt.NDArray[np.float64]:
        """float64 [n, V], nats, of what follows each of `ids`."""
        z = as_float(self.states(ids)).astype(np.float64) @ self.weight.T.astype(np.float64)
        if self._bias is not None:
            z += self._bias
        if self.soft_cap is not None:
            z = self.soft_cap * np.tanh(z / self.soft_cap)
        z *= self.scale
        z -= z.max(1, keepdims=True)
        logprobs: npt.NDArray[np.float64] = z - np.log(np.exp(z).sum(1, keepdims=True))
        return logprobs

    async def answer(
        self, data: bytes, names: tuple[str, ...], max_model_len: int, receive: Receive, send: Send
    ) -> None:
        body = json.loads(data)
        self.answered += 1
        if self.hang:
            await asyncio.sleep(3600)
        if self.status is not None:
            raise RefusedError("no", None, code=self.status)
        if body.get("model") not in names:
            raise RefusedError(f"The model `{body.get('model')}` does not exist.", "model", "NotFoundError", 404)
        if body.get("task") != self.task:
            text = f"Try switching the model's pooling_task via --pooler-config.task {body.get('task')}."
            raise RefusedError(f"{text} (parameter=task)", "task")
        prompts = body["input"] if isinstance(body["input"][0], list) else [body["input"]]
        for ids in prompts:
            if len(ids) > max_model_len:
                raise RefusedError(f"maximum context length is {max_model_len} tokens", "input_tokens")
        assert (body["encoding_format"], body["embed_dtype"], body["endianness"]) == (
            "bytes_only",
            "bfloat16",
            "little",
        )
        rows = np.concatenate([self.states(ids) for ids in prompts])
        content = (rows[:-1] if self.short else rows).astype("<u2").tobytes()
        headers = [(b"content-type", b"application/octet-stream")]
        if self.bomb:
            headers.append((b"content-encoding", b"gzip"))
            content = gzip.compress(bytes(self.endless))
        await start(send, 200, headers)
        self.sent = 0
        pieces = [content]
        if self.endless and not self.bomb:
            pieces = [bytes(PIECE)] * (self.endless // PIECE)
        elif self.slow:
            pieces = [content[n : n + 1] for n in range(len(content))]
        gone = asyncio.ensure_future(disconnected(receive))
        try:
            for piece in pieces:
                await asyncio.sleep(self.slow)
                # It waits until the connection takes more, or is closed.
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                if gone.done():
                    return
                self.sent += len(piece)
            await send({"type": "http.response.body", "body": b""})
        finally:
            gone.cancel()
