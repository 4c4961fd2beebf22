"""The steps of `hemostat adapt`: texts, the build, the figures on held-out prompts, the files."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hemostat import __version__
from hemostat.adapters.serving.slots import rank_setting
from hemostat.commands.arguments import EXIT_INTERRUPTED, UsageError
from hemostat.config import packages
from hemostat.report.progress import Reporter
from hemostat_calibration.profiles.peft import peft_files
from hemostat_lab.commands.texts import Writer, texts_digest, within_positions
from hemostat_lab.doctor.prompts import Prompt, load
from hemostat_lab.models.checkpoint_folders import (
    build_folder,
    cache_folder,
    is_complete,
    is_free,
    read_made_from,
    require_replaceable,
)
from hemostat_lab.models.work_folder import WorkFolder

if TYPE_CHECKING:
    from hemostat_lab.adapters.build import Built
    from hemostat_lab.adapters.pair import CheckpointPair

PROFILE_FILE = "profile.safetensors"
REPORT_FILE = "report.json"
MAX_HELD_OUT_TOKENS = 4096
"""More narrow the interval little: it depends on the number of prompts."""
MORE_BITS_SHARE = 0.25
"""The share of the quantized layers' bytes that one more bit than four for each weight costs. An adapter that takes
more gets a warning. See `docs/results.md`.
"""


@dataclass(frozen=True, slots=True)
class AdaptOptions:
    """The options of `hemostat adapt`, named as on the command line."""

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
    overwrite: bool = False


def run(options: AdaptOptions) -> int:
    """Write the adapter and print what it recovers. Returns the exit code. Raises HemostatError."""
    packages.require("lab")
    if options.max_rank is not None and not options.shared_out:
        raise UsageError("--max-rank is for shared-out ranks: add --shared-out, or leave it out")
    from hemostat_lab.adapters.build import BuildOptions  # noqa: PLC0415  torch, only after the cheap checks
    from hemostat_lab.adapters.pair import CheckpointPair  # noqa: PLC0415

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
        made_from = key | {"--model": options.model}
        if read_made_from(options.out) == made_from and is_complete(options.out):
            report = json.loads((options.out / REPORT_FILE).read_text(encoding="utf-8"))
            print("\n".join(summary(report, options.out)))  # noqa: T201
            return 0
        if not is_free(options.out):
            require_replaceable(options.out, made_from, overwrite=options.overwrite)
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
            _write(built, made_from, options, reporter)
            if options.work is None:
                # Token ids can be decoded to text: they stay on disk only if the user named a folder.
                work.remove()
    print("\n".join(summary(built.report, options.out)))  # noqa: T201
    return 0


def _key(pair: CheckpointPair, options: AdaptOptions) -> dict[str, Any]:
    """Everything that stored results depend on."""
    paths = ("reference", "compressed", "out", "prompts", "records", "work", "model", "overwrite")
    return {
        "hemostat": __version__,
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "reference": pair.reference.digest(),
        "compressed": pair.compressed.digest(),
        "texts": texts_digest(options.prompts, options.records),
        **{f"--{name.replace('_', '-')}": value for name, value in asdict(options).items() if name not in paths},
    }


def _build(
    pair: CheckpointPair, prompts: Sequence[Prompt], build_options: Any, options: AdaptOptions, work: WorkFolder,
    reporter: Reporter,
) -> Built:  # fmt: skip
    from hemostat.checkpoints.architectures import max_positions  # noqa: PLC0415
    from hemostat.checkpoints.texts import read_records, split  # noqa: PLC0415
    from hemostat_lab.adapters.build import build, judged, vocab_size_of  # noqa: PLC0415
    from hemostat_lab.models.parts import Parts  # noqa: PLC0415

    limit = max_positions(pair.compressed.config)
    if options.records is not None:
        texts = read_records(options.records, vocab_size_of(pair))
    else:
        # By the compressed checkpoint: it is the one that is served.
        writer = Writer(
            pair.compressed.folder,
            "COMPRESSED",
            vocab_size_of(pair),
            options.device,
            options.max_new_tokens,
            options.seed,
            limit,
        )
        texts = writer.texts(prompts, work, reporter)
    split_texts = split(within_positions(texts, limit, reporter), options.held_out, options.tokens, MAX_HELD_OUT_TOKENS)
    tokens = sum(map(len, split_texts.learn))
    reporter.log(f"learning from {tokens} tokens of {len(split_texts.learn)} texts")
    parts = Parts(work)
    built = build(pair, split_texts.learn, build_options, parts, reporter.step)
    if options.distil:
        from hemostat_lab.adapters.distil import distilled  # noqa: PLC0415
        from hemostat_lab.models.training import summary_line  # noqa: PLC0415

        built = distilled(pair, built, split_texts.learn, parts, seed=options.seed, progress=reporter.step)
        if built.report["distilled"] is not None:
            reporter.log(summary_line(built.report["distilled"]))
    if split_texts.held_out:
        built, _ = judged(pair, built, split_texts.held_out, parts, reporter.step)
    return built


def _write(built: Built, made_from: dict[str, Any], options: AdaptOptions, reporter: Reporter) -> None:
    """Writes all files, or none: they are written to a folder next to `options.out`, which is then renamed. Raises
    HemostatError.
    """
    files = {
        **peft_files(built.profile, str(options.compressed)),
        PROFILE_FILE: built.profile.to_bytes(),
        REPORT_FILE: json.dumps(built.report, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n",
    }

    def write(folder: Path) -> None:
        for name, data in files.items():
            (folder / name).write_bytes(data)

    try:
        build_folder(options.out, made_from, write, reporter.log, overwrite=options.overwrite)
    except OSError as error:
        raise UsageError(
            f"--out: {options.out} cannot be written ({error.strerror}); free some space or name another folder"
        ) from None


def summary(report: dict[str, Any], out: Path) -> list[str]:
    """Returns the lines that the command prints for people."""
    held = report["held_out"]
    lines = []
    if held is None:
        lines.append("not judged: no text was held out")
    else:
        interval = "" if held["share_low"] is None else f" [{held['share_low']:.1%}, {held['share_high']:.1%}]"
        share = "nothing to recover" if held["share"] is None else f"{held['share']:.1%}{interval} recovered"
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
            f"hint: at {report['engine_bytes_share']:.0%} more bytes, more bits may recover more: on the model in "
            "docs/results.md 5 and 6 bits (+24 and +47 % bytes) left a KL of 0.187 and 0.044, an adapter of +69 % 0.096"
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
