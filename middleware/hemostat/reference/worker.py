"""The reference worker, `python -m hemostat.reference.worker PARENT_PID`: a whole model, or only the output head of one
whose hidden states a server computes. Hemostat imports torch only in such processes.

It answers the frames of `worker_messages` one after another, and ends with its standard input or its parent.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hemostat.checkpoints.architectures import check_causal, max_positions
from hemostat.checkpoints.checkpoint_digest import checkpoint_digest
from hemostat.config import packages
from hemostat.config.packages import install_command
from hemostat.ipc import child_process as child
from hemostat.reference import device, worker_messages
from hemostat.reference.hidden.products import Head
from hemostat.reference.protocol import FailureReason
from hemostat.reference.scoring import Comparisons, HeldBases, RequestFailed, output_and_ids, scored
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.messages import one_line

NICENESS = 10
"""The niceness of the worker: scoring yields the processor to whatever serves clients on this machine."""


class Model:
    """The loaded checkpoint. It raises RequestFailed."""

    def __init__(self, load: worker_messages.Load, tell: Callable[[device.Choice], None]) -> None:
        """tell: called with the device before the weights are loaded, where it was chosen here."""
        try:
            import torch  # noqa: PLC0415  slow to import, and an extra
            from transformers import AutoConfig, AutoModelForCausalLM, logging  # noqa: PLC0415
        except ImportError as error:
            raise RequestFailed(
                FailureReason.NOT_INSTALLED,
                packages.missing("transformers") or f"{error}; {install_command('transformers')}",
            ) from error
        torch.set_num_threads(load.threads)
        logging.disable_progress_bar()
        dtype = load.dtype if load.dtype == "auto" else getattr(torch, load.dtype)
        self._name = load.model
        self._torch = torch
        config = AutoConfig.from_pretrained(load.model)
        check_causal(config)
        choice = device.resolve(load.device, load.only, lambda: _weight_bytes(config, load.dtype))
        if choice is not None:
            tell(choice)
        to = load.device if choice is None else choice.device
        self._model: Any = AutoModelForCausalLM.from_pretrained(load.model, dtype=dtype).to(to).eval()
        self._tokenizer: Any = None
        self._bases = HeldBases(self._on_device)
        self._comparisons = Comparisons(self._output_embedding)
        config = self._model.config.get_text_config()
        problem = _nonlinearity(self._model)
        self.loaded = worker_messages.Loaded(
            digest=checkpoint_digest(load.model, getattr(self._model.config, "_commit_hash", None)),
            dtype=str(self._model.dtype).removeprefix("torch."),
            vocab_size=int(config.vocab_size),
            max_positions=max_positions(config) or 0,
            folder=_folder(load.model),
            hidden_size=0 if problem else int(self._model.get_output_embeddings().weight.shape[1]),
            hidden_detail=problem,
            compares=not problem,
        )

    def answer(self, request: worker_messages.Request) -> worker_messages.Answer:
        match request:
            case worker_messages.Score():
                return self._score(request)
            case worker_messages.Tokenize():
                return worker_messages.TokenIds(
                    request.id, self._tokens().encode(request.text, add_special_tokens=False)
                )
            case worker_messages.Render():
                tokenizer = self._tokens()
                if not tokenizer.chat_template:
                    raise RequestFailed(FailureReason.NO_CHAT_TEMPLATE, f"{self._name} has no chat template")
                ids = tokenizer.apply_chat_template(request.messages, add_generation_prompt=True, return_dict=False)
                return worker_messages.TokenIds(request.id, ids)
            case _:
                raise RequestFailed(FailureReason.PROTOCOL, "the model is loaded already")

    def _tokens(self) -> Any:
        if self._tokenizer is None:
            from transformers import AutoTokenizer  # noqa: PLC0415

            self._tokenizer = AutoTokenizer.from_pretrained(self._name)
        return self._tokenizer

    def _score(self, request: worker_messages.Score) -> worker_messages.Scored:
        from hemostat.reference.exact import score  # noqa: PLC0415

        bases, codes = self._bases.of(request)
        output, ids = output_and_ids(request)
        try:
            comparison = self._comparisons.of(request)
            scores = score(
                self._model,
                np.frombuffer(request.prompt, "<i4"),
                output,
                ids,
                bases,
                codes,
                hidden=request.hidden and self.loaded.hidden_size > 0,
                reshaped=request.reshaped,
                allowed=None if request.allowed is None else request.allowed.sets(),
                see=None if comparison is None else comparison.update,
            )
        except (ValueError, InvalidArgumentError) as error:
            raise RequestFailed(FailureReason.VOCABULARY, str(error)) from error
        return scored(request.id, scores, comparison)

    def _output_embedding(self) -> Any:
        return self._model.get_output_embeddings().weight.detach()

    def _on_device(self, values: np.ndarray[Any, Any]) -> Any:
        return self._torch.tensor(values).to(self._model.device)


def _weight_bytes(config: Any, dtype: str) -> int | None:
    """Returns the bytes of the model's weights, from a model without memory; None if it cannot be built so."""
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    wanted = getattr(torch, dtype) if dtype != "auto" else stored or torch.float32
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        size: int = torch.empty(0, dtype=wanted).element_size()
    except Exception:  # noqa: BLE001  whatever an unusual model raises: its size is then unknown
        return None
    return sum(int(parameter.numel()) for parameter in model.parameters()) * size


def _nonlinearity(model: Any) -> str:
    from hemostat.reference.exact import nonlinearity  # noqa: PLC0415

    try:
        return nonlinearity(model)
    except Exception as error:  # noqa: BLE001  whatever an unusual model raises here, it can still be scored
        return f"its output embedding could not be read ({one_line(error)})"


def _folder(model: str) -> str:
    """Returns the checkpoint's folder; for a hub name it is the folder in the hub's cache."""
    if Path(model).is_dir():
        return str(Path(model).absolute())
    from transformers.utils import cached_file  # noqa: PLC0415

    return str(Path(cached_file(model, "config.json")).parent)


def main(parent: int) -> int:
    """Runs the worker. Returns the exit status: 0 when the input ended, 1 when the model did not load."""
    bodies, send = child.connect_to_parent(parent, NICENESS)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def reply(answer: worker_messages.Answer) -> None:
        send(worker_messages.ANSWERS.encode(answer))

    def tell(choice: device.Choice) -> None:
        reply(worker_messages.Chosen(choice.device, choice.reason))

    model: Model | Head | None = None
    for body in bodies:
        request = worker_messages.REQUESTS.decode(body)
        number = getattr(request, "id", -1)
        try:
            if isinstance(request, worker_messages.Load | worker_messages.LoadHead):
                model = Model(request, tell) if isinstance(request, worker_messages.Load) else Head(request, tell)
                reply(model.loaded)
            elif model is None:
                raise RequestFailed(FailureReason.PROTOCOL, "the first request must be load")
            else:
                reply(model.answer(request))
        except RequestFailed as failure:
            reply(worker_messages.Failed(number, failure.reason, str(failure)))
        except Exception as error:  # noqa: BLE001  a process boundary: whatever a model raises becomes an answer
            out_of_memory = "memory" in str(error).lower()
            reason = FailureReason.OUT_OF_MEMORY if out_of_memory else FailureReason.MODEL_ERROR
            reply(worker_messages.Failed(number, reason, f"{type(error).__name__}: {one_line(error)}"))
        if model is None:
            return 1
    return 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main(int(sys.argv[1])))
