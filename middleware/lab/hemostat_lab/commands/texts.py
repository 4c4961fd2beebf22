"""Texts for commands that calibrate: prompts with their completions, which a checkpoint writes where there are none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hemostat.checkpoints.errors import AdaptError
from hemostat.commands.arguments import UsageError
from hemostat.report.progress import Reporter
from hemostat_calibration.messages import one_line
from hemostat_lab.doctor.prompts import Prompt
from hemostat_lab.models.work_folder import WorkFolder

if TYPE_CHECKING:
    from hemostat.checkpoints.texts import Ids, Text
    from hemostat_lab.models.copies import Copy

GENERATION_BATCH = 16
GENERATION_STAGE = "generated prompts"


@dataclass(frozen=True, slots=True)
class Writer:
    """The checkpoint that completes prompts, at temperature 1, and its tokenizer.

    label: how errors name it. max_positions: a completion ends where its text has so many tokens; None: nowhere.
    """

    folder: Path
    label: str
    vocab_size: int
    device: str
    max_new_tokens: int
    seed: int
    max_positions: int | None = None

    def texts(self, prompts: Sequence[Prompt], work: WorkFolder, reporter: Reporter) -> list[Text]:
        """Returns the prompts with their completions; a prompt without one is completed. Raises AdaptError or
        UsageError."""
        from hemostat.checkpoints.texts import Text, check_ids  # noqa: PLC0415  torch

        tokenizer = self._tokenizer()
        encoded: list[Ids] = []
        for prompt in prompts:
            ids = np.array(self._encode(tokenizer, prompt), np.int32)
            if not len(ids):
                raise UsageError(f"{prompt.where}: the prompt has no tokens; fill it in or leave the line out")
            check_ids(ids, self.vocab_size, prompt.where)
            encoded.append(ids)
        outputs: dict[int, Ids] = {
            n: np.array(tokenizer.encode(prompt.completion, add_special_tokens=False), np.int32)
            for n, prompt in enumerate(prompts)
            if prompt.completion is not None
        }
        limits = [self._max_tokens(prompt, ids) for prompt, ids in zip(prompts, encoded, strict=True)]
        to_write = [n for n in range(len(prompts)) if n not in outputs and limits[n] > 0]
        outputs |= self._generated(to_write, encoded, limits, tokenizer, work, reporter)
        nothing = np.empty(0, np.int32)
        return [Text(ids, outputs.get(n, nothing)) for n, ids in enumerate(encoded)]

    def _max_tokens(self, prompt: Prompt, ids: Ids) -> int:
        """Returns the largest number of tokens of the prompt's completion. It is 0 or less if the model has no position
        for one.
        """
        limit = min(prompt.max_tokens or self.max_new_tokens, self.max_new_tokens)
        return limit if self.max_positions is None else min(limit, self.max_positions - len(ids))

    def _generated(
        self, numbers: Sequence[int], encoded: Sequence[Ids], limits: Sequence[int], tokenizer: Any,
        work: WorkFolder, reporter: Reporter,
    ) -> dict[int, Ids]:  # fmt: skip
        """Returns the completions, which are stored in the work folder by batch. The whole model is in memory
        meanwhile.
        """
        import torch  # noqa: PLC0415

        from hemostat_lab.models.copies import Copy  # noqa: PLC0415
        from hemostat_lab.models.generation import generate  # noqa: PLC0415

        result: dict[int, Ids] = {}
        model: Copy | None = None
        for begin in range(0, len(numbers), GENERATION_BATCH):
            batch = numbers[begin : begin + GENERATION_BATCH]
            name = f"texts-{begin:06d}"
            data = work.get(name)
            if data is None:
                model = model or Copy.load(self.folder, self.device, label=self.label)
                ends = getattr(model.model.generation_config, "eos_token_id", None)
                ends = tokenizer.eos_token_id if ends is None else ends
                # One random stream for each prompt: its text does not depend on other prompts.
                uniforms = [np.random.default_rng([self.seed, n]).random(self.max_new_tokens) for n in batch]
                with torch.inference_mode():
                    texts = generate(
                        model.model,
                        [encoded[n] for n in batch],
                        [limits[n] for n in batch],
                        uniforms,
                        frozenset() if ends is None else frozenset(np.atleast_1d(ends).tolist()),
                    )
                data = json.dumps([text.tolist() for text in texts]).encode()
                work.put(name, data)
            result |= {n: np.array(ids, np.int32) for n, ids in zip(batch, json.loads(data), strict=True)}
            reporter.step(GENERATION_STAGE, min(begin + GENERATION_BATCH, len(numbers)), len(numbers))
        return result

    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer  # noqa: PLC0415

        from hemostat_lab.models.quiet import quiet_transformers  # noqa: PLC0415

        try:
            with quiet_transformers():
                return AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        except Exception as error:  # noqa: BLE001  any library may fail here
            raise AdaptError(
                f"{self.label}: the tokenizer of {self.folder} cannot be loaded ({one_line(error)}); use --records"
            ) from None

    def _encode(self, tokenizer: Any, prompt: Prompt) -> list[int]:
        if prompt.messages is None:
            return list(tokenizer.encode(prompt.text))
        if not tokenizer.chat_template:
            raise UsageError(f"{prompt.where}: {self.label} has no chat template; give prompt instead of messages")
        try:
            return list(tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True, return_dict=False))
        except Exception as error:  # noqa: BLE001  a template is code of the checkpoint and may raise anything
            raise UsageError(f"{prompt.where}: the chat template rejects the messages: {one_line(error)}") from None


def within_positions(texts: Sequence[Text], max_positions: int | None, reporter: Reporter) -> list[Text]:
    """The texts, those that are longer cut at `max_positions` tokens, with a note; None: none is.

    A model with learned positions cannot read more, and others were not trained on more.
    """
    if max_positions is None:
        return list(texts)
    longer = sum(len(text) > max_positions for text in texts)
    if longer:
        reporter.log(f"note: {longer} of {len(texts)} texts are cut at {max_positions} tokens: the model's positions")
    return [text.beginning(max_positions) if len(text) > max_positions else text for text in texts]


def texts_digest(prompts: Path | None, records: Path | None) -> str:
    """Returns the digest of the file of prompts or records, or `packaged` if neither is given. Raises UsageError."""
    source = records or prompts
    try:
        return "packaged" if source is None else hashlib.sha256(source.read_bytes()).hexdigest()
    except OSError as error:
        flag = "--prompts" if records is None else "--records"
        raise UsageError(f"{flag}: {source} cannot be read ({error.strerror}); name a text file") from None
