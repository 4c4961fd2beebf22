"""The steps of `hemostat adapt`: texts, the build, the figures on held-out prompts, the files."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hemostat import __version__
from hemostat.commands.arguments import UsageError
from hemostat.doctor.progress import Reporter
from hemostat.doctor.prompts import Prompt, load
from hemostat.engines.lora.slots import rank_setting
from hemostat.models.adapters.errors import AdaptError
from hemostat.models.checkpoint_folders import cache_folder
from hemostat.models.work_folder import WorkFolder
from hemostat_calibration.profiles.peft import CONFIG_FILE, WEIGHTS_FILE, peft_files

if TYPE_CHECKING:
    from hemostat.models.adapters.build import Built
    from hemostat.models.adapters.pair import CheckpointPair
    from hemostat.models.adapters.texts import Ids, Text

PROFILE_FILE = "profile.safetensors"
REPORT_FILE = "report.json"
FILES = (CONFIG_FILE, WEIGHTS_FILE, PROFILE_FILE, REPORT_FILE)
EXIT_INTERRUPTED = 130
MAX_HELD_OUT_TOKENS = 4096
"""More narrow the interval little: it depends on the number of prompts."""
GENERATION_BATCH = 16
GENERATION_STAGE = "generated prompts"
MORE_BITS_SHARE = 0.25
"""Of the quantized layers' bytes: what one more bit of four costs. See `docs/results.md`."""


@dataclass(frozen=True, slots=True)
class AdaptOptions:
    """As on the command line."""

    reference: Path
    compressed: Path
    out: Path
    prompts: Path | None = None
    records: Path | None = None
    rank: int = 16
    max_rank: int | None = None
    shared_out: bool = False
    metric: Literal["auto", "kfac", "full", "diagonal"] = "auto"
    memory_mib: int = 4096
    tokens: int = 16_000
    held_out: float = 0.25
    max_new_tokens: int = 128
    distil: bool = False
    seed: int = 0
    device: str = "cpu"
    model: str = ""
    work: Path | None = None


def run(options: AdaptOptions) -> int:
    """Write the adapter and print what it wins back. Returns the exit code. Raises HemostatError."""
    missing = [name for name in ("torch", "transformers", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"not installed: {', '.join(missing)}; pip install 'hemostat[transformers]'")
    _check_out(options.out)
    if options.max_rank is not None and not options.shared_out:
        raise UsageError("--max-rank is for shared-out ranks: add --shared-out, or leave it out")
    from hemostat.models.adapters.build import BuildOptions  # noqa: PLC0415  torch, only after the cheap checks
    from hemostat.models.adapters.pair import CheckpointPair  # noqa: PLC0415

    build_options = BuildOptions(
        rank=options.rank,
        max_rank=options.max_rank,
        shared_out=options.shared_out,
        metric=options.metric,
        memory_mib=options.memory_mib,
        seed=options.seed,
        model=options.model,
    )
    prompts = load(options.prompts, None) if options.records is None else []
    with Reporter() as reporter:
        reporter.log("reading both checkpoints")
        pair = CheckpointPair.open(options.reference, options.compressed, options.device)
        key = _key(pair, options)
        folder = options.work or cache_folder() / "adapt" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        with WorkFolder(folder, key, "adapt") as work:
            try:
                built = _build(pair, prompts, build_options, options, work, reporter)
            except KeyboardInterrupt:
                reporter.log(f"interrupted: finished work is in {folder}; the same command continues from it")
                return EXIT_INTERRUPTED
            finally:
                for note in work.notes:
                    reporter.log(note)
            _write(built, options)
            if options.work is None:
                # Token ids can be decoded to text: they stay on disk only if the user named a folder.
                work.remove()
    _print(built, options)
    return 0


def _key(pair: CheckpointPair, options: AdaptOptions) -> dict[str, Any]:
    """Everything that stored results depend on."""
    source = options.records or options.prompts
    try:
        text = "packaged" if source is None else hashlib.sha256(source.read_bytes()).hexdigest()
    except OSError as error:
        flag = "--prompts" if options.records is None else "--records"
        raise UsageError(f"{flag}: {source} cannot be read ({error.strerror}); name a text file") from None
    paths = ("reference", "compressed", "out", "prompts", "records", "work", "model")
    return {
        "hemostat": __version__,
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "reference": pair.reference.digest(),
        "compressed": pair.compressed.digest(),
        "texts": text,
        **{f"--{name.replace('_', '-')}": value for name, value in asdict(options).items() if name not in paths},
    }


def _build(
    pair: CheckpointPair, prompts: Sequence[Prompt], build_options: Any, options: AdaptOptions, work: WorkFolder,
    reporter: Reporter,
) -> Built:  # fmt: skip
    from hemostat.models.adapters.build import build, judged, vocab_size_of  # noqa: PLC0415
    from hemostat.models.adapters.parts import Parts  # noqa: PLC0415
    from hemostat.models.adapters.texts import read_records, split  # noqa: PLC0415

    if options.records is not None:
        texts = read_records(options.records, vocab_size_of(pair))
    else:
        texts = _texts(pair, prompts, options, work, reporter)
    parted = split(texts, options.held_out, options.tokens, MAX_HELD_OUT_TOKENS)
    tokens = sum(map(len, parted.learn))
    reporter.log(f"learning from {tokens} tokens of {len(parted.learn)} texts")
    parts = Parts(work)
    built = build(pair, parted.learn, build_options, parts, reporter.step)
    if options.distil:
        from hemostat.models.adapters.distil import distilled, summary_line  # noqa: PLC0415

        built = distilled(pair, built, parted.learn, parts, seed=options.seed, progress=reporter.step)
        if built.report["distilled"] is not None:
            reporter.log(summary_line(built.report["distilled"]))
    if parted.held_out:
        built, _ = judged(pair, built, parted.held_out, parts, reporter.step)
    return built


def _texts(
    pair: CheckpointPair, prompts: Sequence[Prompt], options: AdaptOptions, work: WorkFolder, reporter: Reporter
) -> list[Text]:
    """The prompts with their completions; those without one are completed by the compressed model, at temperature 1."""
    from hemostat.models.adapters.build import vocab_size_of  # noqa: PLC0415
    from hemostat.models.adapters.texts import Text, check_ids  # noqa: PLC0415

    tokenizer = _tokenizer(pair)
    vocab_size = vocab_size_of(pair)
    encoded: list[Ids] = []
    for prompt in prompts:
        ids = np.array(_encode(tokenizer, prompt), np.int32)
        if not len(ids):
            raise UsageError(f"{prompt.where}: the prompt has no tokens; fill it in or leave the line out")
        check_ids(ids, vocab_size, prompt.where)
        encoded.append(ids)
    outputs: dict[int, Ids] = {
        n: np.array(tokenizer.encode(prompt.completion, add_special_tokens=False), np.int32)
        for n, prompt in enumerate(prompts)
        if prompt.completion is not None
    }
    to_write = [n for n in range(len(prompts)) if n not in outputs]
    outputs |= _generated(to_write, encoded, prompts, options, tokenizer, work, reporter)
    return [Text(ids, outputs[n]) for n, ids in enumerate(encoded)]


def _generated(
    numbers: Sequence[int], encoded: Sequence[Ids], prompts: Sequence[Prompt], options: AdaptOptions, tokenizer: Any,
    work: WorkFolder, reporter: Reporter,
) -> dict[int, Ids]:  # fmt: skip
    """Stored in the work folder, by batch. The whole compressed model is in memory meanwhile."""
    import torch  # noqa: PLC0415

    from hemostat.models.adapters.copies import Copy  # noqa: PLC0415
    from hemostat.models.generation import generate  # noqa: PLC0415

    found: dict[int, Ids] = {}
    model: Copy | None = None
    for begin in range(0, len(numbers), GENERATION_BATCH):
        batch = numbers[begin : begin + GENERATION_BATCH]
        name = f"texts-{begin:06d}"
        data = work.get(name)
        if data is None:
            model = model or Copy.load(options.compressed, options.device, label="COMPRESSED")
            ends = getattr(model.model.generation_config, "eos_token_id", None)
            ends = tokenizer.eos_token_id if ends is None else ends
            limits = [min(prompts[n].max_tokens or options.max_new_tokens, options.max_new_tokens) for n in batch]
            # One random stream for each prompt: its text does not depend on other prompts.
            uniforms = [np.random.default_rng([options.seed, n]).random(options.max_new_tokens) for n in batch]
            with torch.inference_mode():
                texts = generate(
                    model.model,
                    [encoded[n] for n in batch],
                    limits,
                    uniforms,
                    frozenset() if ends is None else frozenset(np.atleast_1d(ends).tolist()),
                )
            data = json.dumps([text.tolist() for text in texts]).encode()
            work.put(name, data)
        found |= {n: np.array(ids, np.int32) for n, ids in zip(batch, json.loads(data), strict=True)}
        reporter.step(GENERATION_STAGE, min(begin + GENERATION_BATCH, len(numbers)), len(numbers))
    return found


def _tokenizer(pair: CheckpointPair) -> Any:
    """The compressed checkpoint's: it is the one that is served."""
    from transformers import AutoTokenizer  # noqa: PLC0415

    from hemostat.models.quiet import quiet_transformers  # noqa: PLC0415

    folder = pair.compressed.folder
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # noqa: BLE001  any library may fail here
        text = " ".join(str(error).split())[:200]
        raise AdaptError(f"COMPRESSED: the tokenizer of {folder} cannot be loaded ({text}); use --records") from None


def _encode(tokenizer: Any, prompt: Prompt) -> list[int]:
    if prompt.messages is None:
        return list(tokenizer.encode(prompt.text))
    if not tokenizer.chat_template:
        raise UsageError(f"{prompt.where}: COMPRESSED has no chat template; give prompt instead of messages")
    try:
        return list(tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True, return_dict=False))
    except Exception as error:  # noqa: BLE001  a template is code of the checkpoint and may raise anything
        text = " ".join(str(error).split())[:200]
        raise UsageError(f"{prompt.where}: the chat template rejects the messages: {text}") from None


def _check_out(out: Path) -> None:
    """An empty or new folder, or one that this command wrote."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out: {out} is a file; name a folder")
    if out.is_dir():
        others = sorted({path.name for path in out.iterdir()} - set(FILES))
        if others:
            raise UsageError(f"--out: {out} contains other files, such as {others[0]}; name an empty or a new folder")


def _write(built: Built, options: AdaptOptions) -> None:
    """All files, or none: the folder is written beside its place and renamed. Raises UsageError."""
    out = options.out.absolute()
    files = {
        **peft_files(built.profile, str(options.compressed)),
        PROFILE_FILE: built.profile.to_bytes(),
        REPORT_FILE: json.dumps(built.report, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n",
    }
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            for name, data in files.items():
                (new / name).write_bytes(data)
            if out.exists():
                shutil.move(out, Path(scratch) / "old")
            new.rename(out)
    except OSError as error:
        raise UsageError(
            f"--out: {out} cannot be written ({error.strerror}); free some space or name another folder"
        ) from None


def _print(built: Built, options: AdaptOptions) -> None:
    print("\n".join(summary(built.report, options.out)))  # noqa: T201


def summary(report: dict[str, Any], out: Path) -> list[str]:
    """Lines for people."""
    held = report["held_out"]
    lines = []
    if held is None:
        lines.append("not judged: no text was held out")
    else:
        interval = "" if held["share_low"] is None else f" [{held['share_low']:.1%}, {held['share_high']:.1%}]"
        share = "nothing to win back" if held["share"] is None else f"{held['share']:.1%}{interval} won back"
        lines += [
            f"held-out prompts: {held['tokens']} tokens of {held['prompts']} prompts, full vocabulary",
            f"  KL(r‖c)          {held['kl_before']:.4f} -> {held['kl_after']:.4f} nats; {share}",
            f"  total variation  {held['tv_before']:.3f} -> {held['tv_after']:.3f}",
            f"  same top-1       {held['top1_before']:.1%} -> {held['top1_after']:.1%}",
        ]
    lines.append("by kind of layer: mean rank, part of the weighted squared error that is won (of the learned texts)")
    for kind, row in report["kinds"].items():
        won = "no error" if row["won"] is None else f"{row['won']:.1%}"
        lines.append(f"  {kind:<16} rank {row['rank']:.1f}  {won}")
    lines += [
        f"rank {report['rank']}{' shared out' if report['shared_out'] else ''}, at most {report['max_rank']}, "
        f"from {report['tokens']} tokens",
        f"bytes: {_mib(report['bytes'])} stored (int8), {_mib(report['engine_bytes'])} in the engine (bfloat16"
        f"{', padded to the largest rank' if report['shared_out'] else ''}): "
        f"{report['engine_bytes_share']:.1%} of the {_mib(report['quantized_bytes'])} of the layers that it corrects",
        f"{report['seconds']:.0f} s, {report['cpu_seconds']:.0f} CPU-seconds for the adapter; at most "
        f"{report['peak_mib']:.0f} MiB of memory",
    ]
    if report["engine_bytes_share"] > MORE_BITS_SHARE:
        lines.append(
            f"hint: at {report['engine_bytes_share']:.0%} more bytes, more bits may be the better buy: on the model in "
            "docs/results.md 5 and 6 bits (+24 and +47 % bytes) left a KL of 0.184 and 0.045, an adapter of +69 % 0.098"
        )
    lines += [f"note: {note}" for note in report["notes"]]
    lines += [
        f"{out}: profile {report['version']}",
        f"  vLLM: --enable-lora --max-loras 2 --max-lora-rank {rank_setting(report['max_rank'])} "
        f"--lora-modules NAME={out}; Hemostat: hemostat profile import {out / PROFILE_FILE}",
    ]
    return lines


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"
