"""The parts whose growth is measured: each makes, for one size, what is then called and timed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.support.engine_profiles import make_contextual
from tests.support.records import Truth, log_softmax, make_record

from hemostat.measurement.measurements import Measurements
from hemostat.reference.hidden.head import FinalMap, OutputHead
from hemostat.relay.upstreams.balancer import Balancer
from hemostat_calibration.adapters.correction import low_rank
from hemostat_calibration.adapters.gram import FullGram
from hemostat_calibration.divergence.per_token import divergence
from hemostat_engine.transform import HeldProfile, apply_to_rows
from hemostat_lab.compression.error_compensation import GptqFactor, Grid, damped, gptq
from hemostat_lab.models.checkpoint import Checkpoint
from hemostat_lab.models.parts import Parts
from hemostat_lab.models.skeleton import Skeleton
from hemostat_lab.models.walk import LayerWalk

Call = Callable[[], Any]
RNG = np.random.default_rng(0)
SHAPES = {"1B": (2048, 8192, 32, 8), "8B": (4096, 14_336, 32, 8), "70B": (8192, 28_672, 64, 8)}
"""Width, inner width, heads and key-value heads of Llama's models of these sizes."""


@dataclass(frozen=True, slots=True)
class Part:
    """name: of what is measured. grows: the size that changes. sizes: its values, ascending. make: makes what is called
    for a size; if that has `close`, it is called at the end. fixed: what stays."""

    name: str
    grows: str
    sizes: Sequence[int]
    make: Callable[[int], Call]
    fixed: str


def _record(tokens: int, vocabulary: int, top_k: int, kind: str = "chat text sampled") -> Any:
    z = RNG.normal(0.0, 2.0, (tokens, vocabulary))
    truth = Truth(log_softmax(z), log_softmax(z + RNG.normal(0.0, 0.3, z.shape)), RNG.integers(0, vocabulary, tokens))
    return replace(make_record(truth, top_k), kind=kind)


def _divergence(tokens: int, top_k: int) -> Call:
    record = _record(tokens, 1024, top_k)
    return lambda: divergence(record)


def _observed(kinds: int) -> Call:
    measured = Measurements()
    records = [_record(32, 256, 20, f"kind {n}") for n in range(kinds)]

    def observe() -> None:
        for n in range(64):
            measured.update(records[n % kinds], None, None)

    return observe


def _head(vocabulary: int, width: int, tokens: int) -> Call:
    weight = RNG.integers(0, 0x3C00, (vocabulary, width), np.uint16).view(np.float16)  # 0 to 1
    head = OutputHead(weight, None, FinalMap())
    states = RNG.standard_normal((tokens, width), np.float32) / width

    def score() -> None:
        z = head.logits(states)
        z -= z.max(1, keepdims=True)
        z -= np.log(np.exp(z).sum(1, keepdims=True))

    return score


def _profile(vocabulary: int, rows: int) -> Call:
    held = HeldProfile(make_contextual(0, vocabulary, anchors=256, features=64, rank=32))
    logits = torch.randn(rows, vocabulary)
    counts = torch.zeros(2, dtype=torch.int64)
    return lambda: apply_to_rows(held, logits, range(rows), counts, on_device=torch.tensor)


def _decoder_layer(name: str, tokens: int) -> Call:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    width, inner, heads, keys = SHAPES[name]
    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_attention_heads=heads, num_key_value_heads=keys
    )
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        layer = LlamaDecoderLayer(config, 0)
    layer = layer.to_empty(device="cpu").eval()
    hidden = torch.randn(1, tokens, width)
    with torch.inference_mode():
        for parameter in layer.parameters():
            parameter.fill_(0.01)
        places = LlamaRotaryEmbedding(config)(hidden, torch.arange(tokens)[None])

    def run() -> None:
        with torch.inference_mode():
            layer(hidden, position_embeddings=places)

    return run


def parameters_of(name: str) -> int:
    """Of one decoder layer."""
    width, inner, heads, keys = SHAPES[name]
    return 2 * width * width + 2 * width * keys * (width // heads) + 3 * width * inner


class _Walk:
    """Texts forwards and backwards through a model of so many layers of 1B's shape, one of which is loaded at a time.

    The checkpoint, of random weights in bfloat16, is on disk until `close`.
    """

    def __init__(self, layers: int) -> None:
        from transformers import LlamaConfig

        width, inner, heads, keys = SHAPES["1B"]
        self._config = LlamaConfig(
            vocab_size=1024, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=keys, tie_word_embeddings=True, dtype="bfloat16",
        )  # fmt: skip
        self._folder = tempfile.TemporaryDirectory()
        self._write(Path(self._folder.name))

    def _write(self, folder: Path) -> None:
        from safetensors.torch import save_file
        from transformers import LlamaForCausalLM

        torch.manual_seed(0)
        self._config.save_pretrained(folder)
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(self._config).named_parameters()}
        shards: dict[str, dict[str, torch.Size]] = {}
        for name, shape in shapes.items():
            shards.setdefault(".".join(name.split(".")[:3]), {})[name] = shape
        files = {}
        for number, (_, names) in enumerate(shards.items()):
            # One layer at a time: this process's memory is measured.
            tensors = {
                name: (0.02 * torch.randn(shape)).to(torch.bfloat16) if len(shape) > 1 else torch.ones(shape).bfloat16()
                for name, shape in names.items()
            }
            save_file(tensors, folder / f"{number}.safetensors", {"format": "pt"})
            files |= dict.fromkeys(names, f"{number}.safetensors")
        index = {"metadata": {}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def __call__(self) -> None:
        checkpoint = Checkpoint(Path(self._folder.name), "GROWTH")
        skeleton = Skeleton(checkpoint.config, torch.float32, torch.device("cpu"), "GROWTH")
        texts = [RNG.integers(0, 1024, 128).astype(np.int32)]
        walk = LayerWalk(skeleton, checkpoint.tensor, texts, Parts(None), seed=0)
        walk.gradient(0)
        assert skeleton.most_loaded == 1

    def close(self) -> None:
        self._folder.cleanup()


def _gram(width: int, rows: int = 0) -> FullGram:
    return FullGram.init(width).update(RNG.standard_normal((rows or 2 * width, width)))


def _statistics(width: int, tokens: int) -> Call:
    gram, rows = FullGram.init(width), RNG.standard_normal((tokens, width), np.float32)
    return lambda: gram.update(rows)


def _correction(width: int, rank: int) -> Call:
    inputs, outputs = _gram(width), _gram(width)
    delta = RNG.standard_normal((width, width), np.float32)
    return lambda: low_rank(delta, rank, inputs, outputs)


def _gptq(width: int) -> Call:
    hessian = torch.from_numpy(_gram(width).total.copy())
    weight = torch.randn(width, width)
    groups = weight.reshape(width, -1, 64)
    grid = Grid(4, (groups.abs().amax(-1) / 7).float(), 64)
    return lambda: gptq(weight, GptqFactor.of(damped(hessian)), grid)


def _choose(engines: int) -> Call:
    balancer = Balancer([f"10.0.0.{n}:8000" for n in range(engines)])
    loads = [0] * engines

    def choose() -> None:
        for key in range(1000):
            balancer.choose(loads, key * 2_654_435_761 % (1 << 32))

    return choose


def parts(largest: int) -> list[Part]:
    """largest: width up to which the parts are measured that take its third power."""
    cubic = [width for width in (256, 512, 1024, 2048, 4096, 8192) if width <= largest]
    names = list(SHAPES)
    return [
        Part("figures of one record", "tokens", (64, 256, 1024, 4096), lambda n: _divergence(n, 20), "top 20"),
        Part("figures of one record", "K", (8, 32, 128, 512), lambda k: _divergence(128, k), "128 tokens"),
        Part("64 records into the figures", "kinds", (1, 4, 16, 64), _observed, "32 tokens each"),
        Part("1,000 choices of an engine", "engines", (2, 8, 32, 64), _choose, ""),
        Part(
            "hidden states to log-probabilities", "vocabulary", (32_768, 65_536, 131_072, 262_144),
            lambda v: _head(v, 1024, 32), "32 tokens of width 1,024",
        ),
        Part(
            "hidden states to log-probabilities", "width", (1024, 2048, 4096, 8192),
            lambda d: _head(32_768, d, 32), "32 tokens, 32,768 ids",
        ),
        Part(
            "a contextual profile in the engine", "vocabulary", (32_768, 65_536, 131_072, 262_144),
            lambda v: _profile(v, 8), "8 rows, rank 32",
        ),
        Part(
            "a contextual profile in the engine", "rows", (1, 4, 16, 64), lambda n: _profile(32_768, n), "32,768 ids"
        ),
        Part(
            "a decoder layer, forwards", "parameters", [parameters_of(name) for name in names],
            lambda p: _decoder_layer(next(n for n in names if parameters_of(n) == p), 16), "16 tokens: 1B, 8B, 70B",
        ),
        Part("forwards and backwards, from disk", "layers", (1, 2, 4, 8, 16), _Walk, "of 1B, 128 tokens"),
        Part("a decoder layer, forwards", "tokens", (16, 64, 256), lambda n: _decoder_layer("1B", n), "of 1B"),
        Part(
            "statistics of a layer's inputs", "width", (1024, 2048, 4096, 8192), lambda d: _statistics(d, 128),
            "128 tokens",
        ),
        Part(
            "statistics of a layer's inputs", "tokens", (128, 256, 512, 1024), lambda n: _statistics(1024, n),
            "width 1,024",
        ),
        Part("a correction (adapter)", "width", cubic, lambda d: _correction(d, 16), "square, rank 16, full metric"),
        Part("a correction (adapter)", "rank", (4, 16, 64, 256), lambda r: _correction(512, r), "width 512"),
        Part("a layer to 4 bits (GPTQ)", "width", cubic, _gptq, "square, groups of 64"),
    ]  # fmt: skip
