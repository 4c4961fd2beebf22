"""The job of the process that makes an adapter: the files of its folder, written here and read there.

The folder holds `job.json` (a `Job`) and `tokens.npz`, which `write_job` writes. The process writes
`profile.safetensors` and then `report.json`, each complete or absent.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from hemostat.checkpoints.errors import AdaptError
from hemostat.checkpoints.texts import Text
from hemostat.report.written_files import write_atomically

JOB_FILE = "job.json"
TOKENS_FILE = "tokens.npz"
PROFILE_FILE = "profile.safetensors"
REPORT_FILE = "report.json"


class JobOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The options of a build. device: of torch. distil: the adapter is trained further. The others are fields of
    `BuildOptions` in the laboratory.
    """

    rank: int = 16
    max_rank: int | None = None
    shared_out: bool = False
    metric: str = "auto"
    memory_mib: int = 4096
    device: str = "cpu"
    distil: bool = False
    seed: int = 0


class Job(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The job. reference, compressed: checkpoint folders. model: the served name that the profile is for."""

    reference: str
    compressed: str
    model: str = ""
    options: JobOptions = JobOptions()


def write_job(folder: Path, job: Job, texts: Sequence[Text], held_out: Sequence[bool]) -> None:
    """Writes a job of `texts`. A text whose `held_out` is True is judged on, not learned from. Raises OSError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    tokens = io.BytesIO()
    np.savez(
        tokens,
        ids=np.concatenate([text.ids for text in texts]).astype(np.int32),
        prompt_lengths=np.array([len(text.prompt) for text in texts], np.int32),
        lengths=np.array([len(text) for text in texts], np.int32),
        held_out=np.array(held_out, np.bool_),
    )
    write_atomically(folder / TOKENS_FILE, tokens.getvalue())
    write_atomically(folder / JOB_FILE, msgspec.json.encode(job))


def read_texts(path: Path) -> tuple[list[Text], list[Text]]:
    """Returns the texts of a job that are learned from, and those that are judged on. A text that is too short for that
    is left out. Raises AdaptError if the file is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            ids, prompts, lengths, held = (arrays[n] for n in ("ids", "prompt_lengths", "lengths", "held_out"))
    except (ValueError, KeyError, EOFError) as error:
        raise AdaptError(f"{path} cannot be read: {error}") from None
    if not len(prompts) == len(lengths) == len(held) or int(lengths.sum()) != len(ids) or (prompts > lengths).any():
        raise AdaptError(f"{path}: the lengths do not fit the token ids")
    learn: list[Text] = []
    judge: list[Text] = []
    for text, is_held in zip(_cut(ids.astype(np.int32), prompts, lengths), held.tolist(), strict=True):
        (judge if is_held else learn).append(text)
    return [text for text in learn if len(text) > 1], [text for text in judge if len(text.prompt) and len(text.output)]


def _cut(ids: npt.NDArray[np.int32], prompts: npt.NDArray[np.int32], lengths: npt.NDArray[np.int32]) -> Iterator[Text]:
    start = 0
    for prompt, length in zip(prompts.tolist(), lengths.tolist(), strict=True):
        yield Text(ids[start : start + prompt], ids[start + prompt : start + length])
        start += length
