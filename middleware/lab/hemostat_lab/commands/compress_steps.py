"""The steps of `hemostat compress`: the method, its texts, the folder, and the repair."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hemostat import __version__
from hemostat.checkpoints.checkpoint_digest import checkpoint_digest
from hemostat.commands.arguments import EXIT_INTERRUPTED, UsageError
from hemostat.config import packages
from hemostat.report.progress import Reporter
from hemostat_lab.commands.arguments import WITHOUT_DATA
from hemostat_lab.commands.texts import Writer, texts_digest, within_positions
from hemostat_lab.compression.checkpoint_writer import BuildEnvironment, compress_with
from hemostat_lab.compression.plan import read_plan
from hemostat_lab.doctor.prompts import load
from hemostat_lab.models.checkpoint_folders import (
    REPAIR,
    CompressError,
    cache_folder,
    cache_key,
    folder_digest,
    is_free,
    read_made_from,
    require_replaceable,
)
from hemostat_lab.models.work_folder import WorkFolder

if TYPE_CHECKING:
    from hemostat.checkpoints.texts import Text
    from hemostat_lab.compression.formats import WeightFormat
    from hemostat_lab.compression.frame import Method

BEST = {"w8a8": "smooth", "fp8": "none"}
"""The default of `--calibrate` by scheme; `descent` is the default of every other scheme. See docs/compress.md."""
_PRUNING = ("sparsity", "pattern")


@dataclass(frozen=True, slots=True)
class CompressOptions:
    """The options of `hemostat compress`, named as on the command line. None means that an option is not given."""

    source: Path
    destination: Path
    scheme: str | None = None
    plan: Path | None = None
    compressed: Path | None = None
    group_size: int | str | None = None
    calibrate: str | None = None
    sparsity: float | None = None
    pattern: str | None = None
    prompts: Path | None = None
    records: Path | None = None
    tokens: int = 16_000
    max_new_tokens: int = 96
    repair: bool = False
    seed: int = 0
    device: str = "cpu"
    work: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Raises UsageError if options do not fit together."""
        for name in _PRUNING:
            if getattr(self, name) is not None and self.scheme != "prune":
                raise UsageError(f"--{name} is for --scheme prune: leave it out")
        if self.scheme == "prune" and self.sparsity is None:
            raise UsageError("--scheme prune needs --sparsity, such as --sparsity 0.5")
        if self.scheme in ("nvfp4", "mxfp4") and self.group_size is not None:
            raise UsageError(f"--scheme {self.scheme} has groups of its own size: leave --group-size out")
        if self.scheme in ("w8a8", "fp8") and self.group_size not in (None, "channel"):
            raise UsageError(f"--scheme {self.scheme} has one scale per output channel: leave --group-size out")
        if self.group_size is not None and (self.plan is not None or _is_prune(self)):
            raise UsageError("--group-size is for integers in groups, such as --scheme w4a16: leave it out")
        if self.calibrate is not None and _is_prune(self):
            raise UsageError("--calibrate is for quantization: leave it out")
        if self.plan is not None and self.calibration == "none":
            raise UsageError(
                "--calibrate none: a plan needs texts; use clip, which rounds to nearest with fitted scales"
            )
        for name in ("calibrate", "group_size"):
            if self.compressed is not None and getattr(self, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} is for --scheme: --compressed is repaired as it is")
        if self.calibration == "smooth" and self.scheme != "w8a8":
            raise UsageError("--calibrate smooth is for --scheme w8a8, whose inputs are rounded; use awq")
        if self.scheme == "fp8" and self.calibration not in ("none", "awq"):
            raise UsageError(f"--calibrate {self.calibrate} is for integers: --scheme fp8 takes none or awq")
        self._check_destination()

    def _check_destination(self) -> None:
        """Refuses a DEST that holds something that is read: with --overwrite, DEST is replaced. Raises UsageError."""
        destination = self.destination.resolve()
        for name in ("source", "compressed", "plan", "prompts", "records", "work"):
            path = getattr(self, name)
            if path is not None and path.resolve().is_relative_to(destination):
                raise UsageError(f"DEST {self.destination} holds {path}, which is read: name another folder for DEST")

    @property
    def calibration(self) -> str:
        return self.calibrate or BEST.get(self.scheme or "", "descent")


def run(options: CompressOptions) -> int:
    """Write the folder and say what it is. Returns the exit code. Raises HemostatError."""
    packages.require("lab")
    if not (options.source / "config.json").is_file():
        raise CompressError(f"{options.source} is not a transformers checkpoint: it has no config.json")
    key = {"source": str(options.source.absolute()), "destination": str(options.destination.absolute())}
    work = options.work or cache_folder() / "compress" / cache_key(key)
    with Reporter() as reporter:
        try:
            lines = _compress(options, work, reporter)
        except KeyboardInterrupt:
            reporter.log(f"interrupted: finished work is in {work}; the same command continues from it")
            return EXIT_INTERRUPTED
    if options.work is None:
        # Token ids can be decoded to text: they stay on disk only if the user named a folder.
        shutil.rmtree(work, ignore_errors=True)
    print("\n".join(lines))  # noqa: T201
    return 0


def _compress(options: CompressOptions, work: Path, reporter: Reporter) -> list[str]:
    """Compresses the checkpoint, and returns lines for people."""
    method = None if options.compressed is not None else _method(options, reporter)
    repaired = options.repair or method is None
    if not is_free(options.destination):  # before texts are written, which can take long
        _check_replaceable(options, method)
    texts = _texts(options, work / "texts", reporter) if method is None or options.repair or method.needs_texts else []
    made = options.compressed or (work / "unrepaired" if repaired else options.destination)
    report: dict[str, Any] = {"layers": {}}
    if method is not None:
        overwrite = options.overwrite or made != options.destination
        environment = BuildEnvironment(work / "layers", options.device, reporter.log, reporter.step, overwrite)
        ids = [text.ids for text in texts]
        report = compress_with(options.source, made, method, ids, seed=options.seed, environment=environment)
    if repaired:
        from hemostat_lab.compression.repair import write_repaired_copy  # noqa: PLC0415

        environment = BuildEnvironment(work / "repair", options.device, reporter.log, reporter.step, options.overwrite)
        report[REPAIR] = write_repaired_copy(
            options.source, made, options.destination, texts, seed=options.seed, environment=environment
        )
    return summary(options, report, sum(map(len, texts)))


def _check_replaceable(options: CompressOptions, method: Method | None) -> None:
    """Raises FolderTakenError if DEST holds something else than these options make, as far as it is known before the
    texts are."""
    known: dict[str, Any] = {"source": folder_digest(options.source), "seed": options.seed}
    if method is not None and not options.repair:
        known["settings"] = json.loads(json.dumps(dict(method.settings)))
    there = read_made_from(options.destination) or {}
    if any(there.get(name) != value for name, value in known.items()):
        require_replaceable(options.destination, known, overwrite=options.overwrite)


def summary(options: CompressOptions, report: dict[str, Any], tokens: int) -> list[str]:
    """Returns the lines that describe what was written."""
    weights = sum(path.stat().st_size for path in options.destination.glob("*.safetensors"))
    before = sum(path.stat().st_size for path in options.source.glob("*.safetensors"))
    how = options.scheme or (f"plan {options.plan}" if options.plan is not None else f"{options.compressed}, repaired")
    if options.scheme == "prune":
        how += f", sparsity {options.sparsity:g}"
    elif not _is_prune(options) and options.compressed is None:
        how += f", calibrate {options.calibration}"
    lines = [
        f"{options.destination}: {how}" + (f", {tokens} tokens of text" if tokens else ", without texts"),
        f"  digest {checkpoint_digest(str(options.destination), None)}",
        f"  {weights} bytes of weights, {weights / before:.1%} of SOURCE's",
    ]
    errors = [e for layer in report["layers"].values() for e in layer.get("relative_error", {}).values()]
    if errors:
        lines.append(
            f"  squared error at the outputs of its {len(errors)} linear layers, relative: "
            f"mean {sum(errors) / len(errors):.2%}, largest {max(errors):.2%}"
        )
    if options.scheme == "prune":
        from hemostat_lab.compression.pruning.method import pathway_lines  # noqa: PLC0415

        lines += [f"  {line}" for line in pathway_lines(report["layers"])]
    if REPAIR in report:
        from hemostat_lab.models.training import summary_line  # noqa: PLC0415

        lines.append(f"  {summary_line(report[REPAIR], REPAIR)}")
    return lines


def _method(options: CompressOptions, reporter: Reporter) -> Method:
    from hemostat_lab.compression.frame import Source  # noqa: PLC0415  torch, only after the cheap checks
    from hemostat_lab.compression.methods import by_name, without_texts  # noqa: PLC0415
    from hemostat_lab.compression.rounding import check_groups  # noqa: PLC0415

    if options.scheme in WITHOUT_DATA:
        return by_name(options.scheme)
    if options.scheme == "prune":
        return _pruning(options)
    from hemostat_lab.compression.calibrated import CALIBRATIONS, Calibrated, planned  # noqa: PLC0415

    if options.plan is not None:
        plan = read_plan(options.plan)
        method, notes = planned(plan, Source.open(options.source), CALIBRATIONS[options.calibration])
        for note in notes:
            reporter.log(f"note: {note}")
        return method
    assert options.scheme is not None
    chosen = _format(options.scheme, options.group_size)
    shapes = Source.open(options.source).shapes
    for name, (outputs, inputs) in shapes.items():
        check_groups(name, inputs, chosen.group_size)
        if chosen.layout != "compressed-tensors" and (outputs * chosen.bits % 32 or inputs * chosen.bits % 32):
            raise CompressError(
                f"layer {name} has {inputs} inputs and {outputs} outputs, which {chosen.bits} bits do not pack into "
                f"whole words: use w{chosen.bits}a16"
            )
    if options.calibration == "none":
        return without_texts(chosen)
    return Calibrated(dict.fromkeys(shapes, chosen), CALIBRATIONS[options.calibration])


def _format(scheme: str, group_size: int | str | None) -> WeightFormat:
    """Returns the format of every layer."""
    from hemostat_lab.compression.formats import FP4, WeightFormat  # noqa: PLC0415
    from hemostat_lab.compression.rounding import GROUP_SIZE  # noqa: PLC0415

    if scheme == "w8a8":
        return WeightFormat(8, inputs="int8")
    if scheme == "fp8":
        return WeightFormat(8, kind="float", inputs="fp8")
    if scheme in FP4:
        return WeightFormat(4, FP4[scheme], "nvfp4" if scheme == "nvfp4" else "mxfp4")
    layout: Literal["compressed-tensors", "gptq", "awq"]
    layout = "gptq" if scheme.endswith("_gptq") else "awq" if scheme.endswith("_awq") else "compressed-tensors"
    size = None if group_size == "channel" else int(group_size or GROUP_SIZE)
    return WeightFormat(int(scheme[1]), size, layout=layout)


def _pruning(options: CompressOptions) -> Method:
    from hemostat_lab.compression.pruning.method import PruneMethod, PruneOptions  # noqa: PLC0415
    from hemostat_lab.compression.pruning.weights import Pattern  # noqa: PLC0415

    assert options.sparsity is not None
    return PruneMethod(PruneOptions(options.sparsity, Pattern(options.pattern or Pattern.UNSTRUCTURED)))


def _texts(options: CompressOptions, folder: Path, reporter: Reporter) -> list[Text]:
    """Returns texts of at most `options.tokens` tokens in all: a sample of all texts, in an order that does not depend
    on the order in the file.
    """
    from hemostat.checkpoints.architectures import max_positions  # noqa: PLC0415
    from hemostat.checkpoints.texts import read_records, split  # noqa: PLC0415
    from hemostat_lab.compression.frame import Source  # noqa: PLC0415

    prompts = load(options.prompts, None) if options.records is None else []
    source = Source.open(options.source)
    vocab_size = int(source.skeleton.model.get_output_embeddings().weight.shape[0])
    limit = max_positions(source.checkpoint.config)
    if options.records is not None:
        texts = read_records(options.records, vocab_size)
    else:
        key = {
            "hemostat": __version__,
            "source": source.checkpoint.digest(),
            "texts": texts_digest(options.prompts, options.records),
            "--max-new-tokens": options.max_new_tokens,
            "--seed": options.seed,
            "--device": options.device,
        }
        writer = Writer(
            options.source, "SOURCE", vocab_size, options.device, options.max_new_tokens, options.seed, limit
        )
        with WorkFolder(folder, key, "compress") as work:
            texts = writer.texts(prompts, work, reporter)
    learn = split(within_positions(texts, limit, reporter), 0.0, options.tokens, 0).learn
    reporter.log(f"calibrating on {sum(map(len, learn))} tokens of {len(learn)} texts")
    return learn


def _is_prune(options: CompressOptions) -> bool:
    return (options.scheme or "").startswith("prune")
