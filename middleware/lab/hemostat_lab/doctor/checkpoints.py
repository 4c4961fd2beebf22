"""Two transformers checkpoints in this process, at full vocabulary. Torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from hemostat.checkpoints.architectures import UnsupportedModelError, check_causal, has_attention, max_positions
from hemostat.checkpoints.checkpoint_digest import checkpoint_digest
from hemostat.checkpoints.errors import AdaptError
from hemostat.checkpoints.piecewise import PiecewiseReader, StatelessModelError
from hemostat.config import packages
from hemostat.reference.match import PROBE_CHAT, PROBE_TEXT
from hemostat_calibration.messages import one_line
from hemostat_lab.doctor.options import DoctorError, DoctorOptions
from hemostat_lab.doctor.pair import FLOOR, Floats, Ids, Job, Scored, Side
from hemostat_lab.doctor.prompts import Prompt
from hemostat_lab.models.copies import Copy
from hemostat_lab.models.experts import has_experts, split_experts
from hemostat_lab.models.generation import generate
from hemostat_lab.models.quiet import quiet_transformers as quiet
from hemostat_lab.models.stored_formats.reading import quantization_of

MAX_PIECE_ELEMENTS = 1 << 26
"""Logits of one forward pass (128 MiB in bfloat16, per model): longer sequences are processed in pieces."""
MAX_CHUNK_ELEMENTS = 1 << 24
"""Elements of one float32 log-softmax (64 MiB)."""
NO_TEMPLATE = "neither model has a chat template: of Hemostat's own prompts, the contents of the messages are the text"
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
        self._own_prompts = options.prompts is None
        self._compare(tokenizer)
        lengths = [max_positions(m.config) for m in (self.reference_model, self.compressed_model)]
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
            if not self._own_prompts:
                raise DoctorError(f"{prompt.where}: neither model has a chat template; give prompt instead of messages")
            if NO_TEMPLATE not in self.notes:
                self.notes.append(NO_TEMPLATE)
            return list(self._tokenizer.encode("\n\n".join(message["content"] for message in prompt.messages)))
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
        try:
            return scored_ids(self.compressed_model, jobs, [seed], greedy, self.end_ids())
        except StatelessModelError as error:
            raise DoctorError(f"COMPRESSED: {error}; generation needs it: give completions, or --given") from None

    def end_ids(self) -> frozenset[int]:
        """Ids that end a text."""
        end = getattr(self.compressed_model.generation_config, "eos_token_id", None)
        end = self._tokenizer.eos_token_id if end is None else end
        return frozenset() if end is None else frozenset(np.atleast_1d(end).tolist())

    def _figures(self, prompt: Ids, output: Ids) -> dict[str, Floats]:
        sequence = sequence_of(prompt, output, self.device)
        emitted = torch.from_numpy(output.astype(np.int64)).to(self.device)
        start = len(prompt) - 1
        piece = max(1, MAX_PIECE_ELEMENTS // self.vocab_size)
        cuts = list(range(start + piece, len(sequence), piece))
        parts: list[dict[str, torch.Tensor]] = []
        done = 0
        for r, c in zip(
            pieces(self.reference_model, sequence, start, cuts),
            pieces(self.compressed_model, sequence, start, cuts),
            strict=True,
        ):
            parts.append(compare(r, c, emitted[done : done + len(r)]))
            done += len(r)
        figures = {name: to_floats(torch.cat([part[name] for part in parts])) for name in parts[0]}
        floor = None if cuts else noise_floor(self.compressed_model, sequence, start, c)
        figures[FLOOR] = np.full(len(output), np.nan) if floor is None else floor
        return figures


def scored_ids(
    model: Any, jobs: Sequence[Job], seed: Sequence[int], greedy: bool, end_ids: frozenset[int]
) -> list[Ids]:
    """The ids to score, by job: those that it has, otherwise what `model` generates at temperature 1, or greedily.

    One random stream, `seed` and the job's index, for each job: its text does not depend on others. Raises
    StatelessModelError.
    """
    to_generate = [job for job in jobs if job.output is None]
    generated: dict[int, Ids] = {}
    if to_generate:
        uniforms = [np.random.default_rng([*seed, job.index]).random(job.tokens) for job in to_generate]
        texts = generate(
            model,
            [job.prompt for job in to_generate],
            [job.tokens for job in to_generate],
            None if greedy else uniforms,
            end_ids,
        )
        generated = {job.index: text for job, text in zip(to_generate, texts, strict=True)}
    return [generated[job.index] if job.output is None else job.output for job in jobs]


def sequence_of(prompt: Ids, output: Ids, device: torch.device) -> torch.Tensor:
    """int64 [L]: the ids that a model reads to predict every id of `output`."""
    return torch.from_numpy(np.concatenate([prompt, output[:-1]]).astype(np.int64)).to(device)


def noise_floor(model: Any, sequence: torch.Tensor, start: int, whole: torch.Tensor) -> Floats | None:
    """KL in nats, float64 [T], between the model's logits `whole` [T, V] of one prefill and those of two pieces.

    It is the effect of rounding. None for a single id, or a model without a state, which cannot read two pieces.
    """
    if len(sequence) < 2:
        return None
    try:
        return to_floats(kl(whole, torch.cat(list(pieces(model, sequence, start, [start or len(sequence) // 2])))))
    except StatelessModelError:
        return None


def pieces(model: Any, sequence: torch.Tensor, start: int, cuts: Sequence[int]) -> Iterator[torch.Tensor]:
    """Logits [n, V] at the positions from `start` on of `sequence` [L], in pieces that end at `cuts` and at L.

    The model keeps its state between the pieces. Raises StatelessModelError where it has none and there are cuts.
    """
    reader = PiecewiseReader(model, keep_state=bool(cuts))
    begin = 0
    for end in [*cuts, len(sequence)]:
        wanted = end - max(start, begin)
        logits = reader.read(sequence[None, begin:end], keep=max(wanted, 1))
        if wanted > 0:
            yield logits[0, -wanted:]
        begin = end


def kl(p_logits: torch.Tensor, q_logits: torch.Tensor) -> torch.Tensor:
    """KL(p‖q) in nats, float64 [T] on q's device, of logits [T, V]."""
    return torch.cat([_kl(p_logits[rows].to(q_logits.device), q_logits[rows]) for rows in _chunks(q_logits)])


def _kl(p_logits: torch.Tensor, q_logits: torch.Tensor) -> torch.Tensor:
    log_p, log_q = (torch.log_softmax(logits.float(), dim=-1) for logits in (p_logits, q_logits))
    return _expected(log_p.exp(), log_p - log_q).clamp_min(0.0)


def compare(r_logits: torch.Tensor, c_logits: torch.Tensor, emitted: torch.Tensor) -> dict[str, torch.Tensor]:
    """The figures of `pair.EXACT` and `pair.ALWAYS`, float64 [T], of logits [T, V] and the scored ids [T]."""
    parts = [_compare(r_logits[rows], c_logits[rows], emitted[rows]) for rows in _chunks(r_logits)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _compare(r_logits: torch.Tensor, c_logits: torch.Tensor, emitted: torch.Tensor) -> dict[str, torch.Tensor]:
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


def _chunks(logits: torch.Tensor) -> Iterator[slice]:
    """Slices of rows of `logits` [T, V] for one float32 log-softmax each."""
    step = max(1, MAX_CHUNK_ELEMENTS // logits.shape[-1])
    return (slice(begin, begin + step) for begin in range(0, len(logits), step))


def _expected(p: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Σ p·values over the last axis, 0 where p is 0; summed in float64."""
    total = (p * values).sum(-1, dtype=torch.float64)
    if total.isnan().any():  # 0 · ∞: a model that masks ids
        total = torch.where(p > 0, p * values, 0.0).sum(-1, dtype=torch.float64)
    return total


def to_floats(tensor: torch.Tensor) -> Floats:
    values: Floats = tensor.double().cpu().numpy()
    return values


def _load(name: str, model: str, device: str, options: DoctorOptions) -> tuple[Side, Any, Any]:
    try:
        with quiet():
            config = AutoConfig.from_pretrained(model)
            check_causal(config)
            described = quantization_of(Path(model), config.to_dict())
            quantized = None if described is None else described[0]
            if quantized and quantized.get("quant_method") == "compressed-tensors":
                packages.require("lab")
            tokenizer = AutoTokenizer.from_pretrained(model)
            in_folder = Path(model).is_dir()
            if quantized and (
                not has_attention(config) or (in_folder and (has_experts(config) or not _loads(quantized)))
            ):
                # transformers does not load these: in models without attention it initializes weights that a quantized
                # checkpoint does not have, and it holds experts in another form. The rest: `_loads`.
                loaded = Copy.load(Path(model), device, options.dtype, name).model
                loaded.generation_config = GenerationConfig.from_pretrained(model)
            else:
                loaded = _load_by_transformers(model, options.dtype).to(device).eval()
                split_experts(loaded)
    except (UnsupportedModelError, AdaptError, packages.MissingPackageError) as error:
        raise DoctorError(f"{name}: {model}: {error}") from None
    except Exception as error:  # noqa: BLE001  any library may fail here
        raise DoctorError(f"{name}: {model} cannot be loaded: {type(error).__name__}: {one_line(error)}") from None
    digest = checkpoint_digest(model, getattr(loaded.config, "_commit_hash", None))
    return (
        Side(model if not Path(model).is_dir() else Path(model).name, digest, str(loaded.dtype).removeprefix("torch.")),
        loaded,
        tokenizer,
    )


def _loads(quantization: dict[str, Any]) -> bool:
    """Whether transformers loads such a checkpoint without packages that Hemostat does not need, or a GPU: of
    compressed-tensors symmetric integers and E4M3 (5.24 does not load packed zero points, 5.19 does)."""
    weights = [group.get("weights") or {} for group in (quantization.get("config_groups") or {}).values()]
    return quantization.get("quant_method") == "compressed-tensors" and all(
        scheme.get("symmetric") is not False and (scheme.get("type"), scheme.get("num_bits")) != ("float", 4)
        for scheme in weights
    )


def _load_by_transformers(model: str, dtype: str) -> Any:
    """UnsupportedModelError where a tensor is missing: transformers would use random weights in its place."""
    named = dtype if dtype == "auto" else getattr(torch, dtype)
    loaded, loading_info = AutoModelForCausalLM.from_pretrained(model, dtype=named, output_loading_info=True)
    if loading_info["missing_keys"]:
        raise UnsupportedModelError(
            f"there is no tensor {min(loading_info['missing_keys'])}; copy the checkpoint again"
        )
    return loaded
