"""Two transformers checkpoints in this process, at full vocabulary. Torch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hemostat.doctor.options import DoctorError, DoctorOptions
from hemostat.doctor.pair import FLOOR, Floats, Ids, Job, Scored, Side, one_line
from hemostat.doctor.prompts import Prompt
from hemostat.models.checkpoint_digest import checkpoint_digest
from hemostat.models.quiet import quiet_transformers as quiet
from hemostat.reference.match import PROBE_CHAT, PROBE_TEXT

MAX_PIECE_ELEMENTS = 1 << 26
"""Logits of one forward pass (128 MiB in bfloat16, per model): longer sequences are processed in pieces."""
MAX_CHUNK_ELEMENTS = 1 << 24
"""Elements of one float32 log-softmax (64 MiB)."""
ANCHOR = "a"
"""Ids are decoded after this text: tokenizers drop a leading space at the start."""


class CheckpointPair:
    """Implements `Pair`."""

    full_vocabulary = True

    def __init__(self, options: DoctorOptions) -> None:
        device = options.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.device = torch.device(device)
        except RuntimeError as error:
            raise DoctorError(f"--device {device}: {one_line(error)}") from None
        self.reference, self.reference_model, self._tokenizer = _load("REFERENCE", options.reference, device, options)
        if options.compressed == options.reference:
            self.compressed, self.compressed_model, tokenizer = self.reference, self.reference_model, self._tokenizer
        else:
            self.compressed, self.compressed_model, tokenizer = _load("COMPRESSED", options.compressed, device, options)
        self.notes: list[str] = []
        self._compare(tokenizer)
        lengths = [
            int(getattr(m.config.get_text_config(), "max_position_embeddings", 0) or 0)
            for m in (self.reference_model, self.compressed_model)
        ]
        self.max_length = min((length for length in lengths if length), default=None)
        with quiet(), torch.inference_mode():
            # Quantized layers unpack their weights at the first use, with a progress bar, which is suppressed here.
            for model in (self.reference_model, self.compressed_model):
                self.vocab_size = int(
                    model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device)).logits.shape[-1]
                )

    def _compare(self, other: Any) -> None:
        """Check that equal ids mean equal texts. Raises DoctorError."""
        sizes = [int(m.config.get_text_config().vocab_size) for m in (self.reference_model, self.compressed_model)]
        fix = "REFERENCE must be the model that COMPRESSED was made from"
        if sizes[0] != sizes[1]:
            raise DoctorError(f"vocabulary: REFERENCE has {sizes[0]} tokens, COMPRESSED has {sizes[1]}; {fix}")
        if self._tokenizer.encode(PROBE_TEXT) != other.encode(PROBE_TEXT):
            raise DoctorError(f"vocabulary: REFERENCE and COMPRESSED give different ids to the same text; {fix}")
        templates = [tokenizer.chat_template for tokenizer in (self._tokenizer, other)]
        if all(templates):
            rendered = [
                t.apply_chat_template(PROBE_CHAT, add_generation_prompt=True, tokenize=False)
                for t in (self._tokenizer, other)
            ]
            if rendered[0] != rendered[1]:
                self.notes.append("the chat templates differ: that of COMPRESSED was used for both")
        # The compressed model is the one that is served, so its template is used.
        self._tokenizer = other if templates[1] else self._tokenizer

    def tokenize(self, prompt: Prompt) -> list[int]:
        if prompt.messages is None:
            return list(self._tokenizer.encode(prompt.text))
        if not self._tokenizer.chat_template:
            raise DoctorError(f"{prompt.where}: neither model has a chat template; give prompt instead of messages")
        try:
            return list(
                self._tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True, return_dict=False)
            )
        except Exception as error:  # noqa: BLE001  a template is code of the checkpoint and may raise anything
            raise DoctorError(f"{prompt.where}: the chat template rejects the messages: {one_line(error)}") from None

    def tokenize_completion(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a response, without special tokens."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def texts(self, ids: Sequence[int]) -> dict[int, str]:
        anchor = self._tokenizer.encode(ANCHOR, add_special_tokens=False)
        start = self._tokenizer.decode(anchor)
        return {
            token: self._tokenizer.decode([*anchor, token], clean_up_tokenization_spaces=False).removeprefix(start)
            for token in ids
        }

    def special(self) -> frozenset[int]:
        return frozenset(self._tokenizer.all_special_ids)

    def close(self) -> None:
        """Nothing to release."""

    def score(self, jobs: Sequence[Job], seed: int, greedy: bool) -> list[Scored]:
        try:
            with torch.inference_mode():
                outputs = self._outputs(jobs, seed, greedy)
                return [
                    Scored(job.index, output, self._figures(job.prompt, output))
                    for job, output in zip(jobs, outputs, strict=True)
                ]
        except torch.OutOfMemoryError as error:
            raise DoctorError(f"out of memory on {self.device}: {one_line(error)}; lower --batch or --tokens") from None

    def _outputs(self, jobs: Sequence[Job], seed: int, greedy: bool) -> list[Ids]:
        to_generate = [job for job in jobs if job.output is None]
        generated: dict[int, Ids] = {}
        if to_generate:
            # One random stream for each prompt: its text does not depend on other prompts.
            uniforms = [np.random.default_rng([seed, job.index]).random(job.tokens) for job in to_generate]
            texts = generate(
                self.compressed_model,
                [job.prompt for job in to_generate],
                [job.tokens for job in to_generate],
                None if greedy else uniforms,
                self.end_ids(),
            )
            generated = {job.index: text for job, text in zip(to_generate, texts, strict=True)}
        return [generated[job.index] if job.output is None else job.output for job in jobs]

    def end_ids(self) -> frozenset[int]:
        """Ids that end a text."""
        end = getattr(self.compressed_model.generation_config, "eos_token_id", None)
        end = self._tokenizer.eos_token_id if end is None else end
        return frozenset() if end is None else frozenset(np.atleast_1d(end).tolist())

    def _figures(self, prompt: Ids, output: Ids) -> dict[str, Floats]:
        sequence = torch.from_numpy(np.concatenate([prompt, output[:-1]]).astype(np.int64)).to(self.device)
        emitted = torch.from_numpy(output.astype(np.int64)).to(self.device)
        start, length = len(prompt) - 1, len(sequence)
        piece = max(1, MAX_PIECE_ELEMENTS // self.vocab_size)
        cuts = list(range(start + piece, length, piece))
        parts: list[dict[str, torch.Tensor]] = []
        done = 0
        for r, c in zip(
            pieces(self.reference_model, sequence, start, cuts),
            pieces(self.compressed_model, sequence, start, cuts),
            strict=True,
        ):
            scored = emitted[done : done + len(r)]
            parts += [compare(r[rows], c[rows], scored[rows]) for rows in chunks(len(r), self.vocab_size)]
            done += len(r)
        figures = {name: _numpy(torch.cat([part[name] for part in parts])) for name in parts[0]}
        figures[FLOOR] = np.full(len(output), np.nan)
        if not cuts and length > 1:
            again = list(pieces(self.compressed_model, sequence, start, [start or length // 2]))
            if again:
                other = torch.cat(again)
                floor = [kl(c[rows], other[rows]) for rows in chunks(len(c), self.vocab_size)]
                figures[FLOOR] = _numpy(torch.cat(floor))
        return figures


def pieces(model: Any, sequence: torch.Tensor, start: int, cuts: Sequence[int]) -> Iterator[torch.Tensor]:
    """Logits [n, V] at the positions from `start` on of `sequence` [L], in pieces that end at `cuts` and at L.

    The pieces share the model's KV cache; with cuts, a model without a cache yields nothing after the first piece.
    """
    can_limit_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
    cache: Any = None
    begin = 0
    for end in [*cuts, len(sequence)]:
        wanted = end - max(start, begin)
        # Without `logits_to_keep` the model computes the logits of the prompt, too.
        keep = {"logits_to_keep": max(wanted, 1)} if can_limit_logits else {}
        held = {"past_key_values": cache} if cache is not None else {}
        answer = model(input_ids=sequence[None, begin:end], use_cache=bool(cuts), **keep, **held)
        if wanted > 0:
            yield answer.logits[0, -wanted:]
        if cuts:
            cache = getattr(answer, "past_key_values", None)
            if cache is None:
                return
        begin = end


def chunks(rows: int, vocab_size: int) -> Iterator[slice]:
    """Slices of rows for one float32 log-softmax each."""
    step = max(1, MAX_CHUNK_ELEMENTS // vocab_size)
    return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


def kl(p_logits: torch.Tensor, q_logits: torch.Tensor) -> torch.Tensor:
    """KL(p‖q) in nats, float64 [n], of logits [n, V]."""
    log_p, log_q = (torch.log_softmax(logits.float(), dim=-1) for logits in (p_logits, q_logits))
    return _expected(log_p.exp(), log_p - log_q).clamp_min(0.0)


def compare(r_logits: torch.Tensor, c_logits: torch.Tensor, emitted: torch.Tensor) -> dict[str, torch.Tensor]:
    """The figures of `pair.EXACT` and `pair.ALWAYS`, float64 [n], of logits [n, V] and the scored ids [n]."""
    log_r, log_c = (torch.log_softmax(logits.float(), dim=-1) for logits in (r_logits, c_logits))
    r, c = log_r.exp(), log_c.exp()
    difference = log_r - log_c
    log_mean = torch.log(0.5 * (r + c))
    return {
        "kl_rc": _expected(r, difference).clamp_min(0.0),
        "kl_cr": _expected(c, -difference).clamp_min(0.0),
        "js": (0.5 * (_expected(r, log_r - log_mean) + _expected(c, log_c - log_mean))).clamp_min(0.0),
        "tv": 0.5 * (r - c).abs().sum(-1, dtype=torch.float64),
        "entropy_r": _expected(r, -log_r),
        "entropy_c": _expected(c, -log_c),
        "logp_r": log_r.gather(1, emitted[:, None])[:, 0].double(),
        "logp_c": log_c.gather(1, emitted[:, None])[:, 0].double(),
        "same_top": (log_r.argmax(-1) == log_c.argmax(-1)).double(),
    }


def _expected(p: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Σ p·values over the last axis, 0 where p is 0; summed in float64."""
    total = (p * values).sum(-1, dtype=torch.float64)
    if total.isnan().any():  # 0 · ∞: a model that masks ids
        total = torch.where(p > 0, p * values, 0.0).sum(-1, dtype=torch.float64)
    return total


def _numpy(tensor: torch.Tensor) -> Floats:
    values: Floats = tensor.double().cpu().numpy()
    return values


def generate(
    model: Any, prompts: Sequence[Ids], limits: Sequence[int], uniforms: Sequence[Floats] | None, ends: frozenset[int]
) -> list[Ids]:
    """Continuations of at most `limits` tokens each, up to and including an id of `ends`.

    Sampled from the whole distribution at temperature 1, by inverting its cumulative sum at `uniforms`; None: greedy.
    """
    device = model.device
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, longest - len(prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    named = inspect.signature(model.forward).parameters
    texts: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    cache: Any = None
    while running:
        more: dict[str, Any] = {"past_key_values": cache} if cache is not None else {}
        if "position_ids" in named:
            more["position_ids"] = positions
        if "logits_to_keep" in named:
            more["logits_to_keep"] = 1
        answer = model(input_ids=ids, attention_mask=mask, use_cache=True, **more)
        cache = getattr(answer, "past_key_values", None)
        if cache is None:
            raise DoctorError("COMPRESSED has no KV cache, which generation needs; give completions, or use --given")
        logits = answer.logits[:, -1].float()
        if uniforms is None:
            chosen = logits.argmax(-1)
        else:
            total = torch.softmax(logits, -1).cumsum(-1, dtype=torch.float64)
            step = [
                u[len(text)] if row in running else 0.5
                for row, (u, text) in enumerate(zip(uniforms, texts, strict=True))
            ]
            at = torch.tensor(step, dtype=torch.float64, device=device)[:, None] * total[:, -1:]
            chosen = torch.searchsorted(total, at, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)
        for row, token in enumerate(chosen.tolist()):
            if row in running:
                texts[row].append(token)
                if token in ends or len(texts[row]) == limits[row]:
                    running.discard(row)
        ids = chosen[:, None]
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        positions = positions[:, -1:] + 1
    return [np.array(text, np.int32) for text in texts]


def _load(name: str, model: str, device: str, options: DoctorOptions) -> tuple[Side, Any, Any]:
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(model)
            loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval()
    except Exception as error:  # noqa: BLE001  any library may fail here
        raise DoctorError(f"{name}: {model} cannot be loaded: {type(error).__name__}: {one_line(error)}") from None
    digest = checkpoint_digest(model, getattr(loaded.config, "_commit_hash", None))
    return (
        Side(model if not Path(model).is_dir() else Path(model).name, digest, str(loaded.dtype).removeprefix("torch.")),
        loaded,
        tokenizer,
    )
