"""`hemostat doctor`: load two models, score prompt by prompt, compare the layers, write the report."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console, RenderableType

from hemostat import __version__
from hemostat.commands.arguments import EXIT_INTERRUPTED
from hemostat.config import packages
from hemostat.report.progress import Reporter
from hemostat_lab.compression.plan import Plan, encode_plan
from hemostat_lab.doctor import html, terminal
from hemostat_lab.doctor.causes.findings import findings
from hemostat_lab.doctor.classes import classify_all
from hemostat_lab.doctor.options import DoctorError, DoctorOptions, check
from hemostat_lab.doctor.pair import Job, Pair, Scored, Side, decoding_of, encode, jobs_digest, pack, unpack
from hemostat_lab.doctor.prompts import Prompt, load
from hemostat_lab.doctor.report import SCHEMA, PromptKind, tables
from hemostat_lab.doctor.sweep import terminal as sweep_terminal
from hemostat_lab.models.checkpoint_folders import cache_folder, cache_key
from hemostat_lab.models.work_folder import WorkFolder

PLAIN_WIDTH = 120
"""Columns, where the output is not a terminal."""
OWN_TEXT = "Q generated the text: PPL(Q) below PPL(base) does not mean that Q is better; use --given for perplexity"
PROMPT_STAGE, LAYER_STAGE, PRESCRIPTION_STAGE = "prompts", "layers", "prescription"
NO_LAYERS = "vLLM servers do not expose their layers: name two checkpoint folders"


def run(options: DoctorOptions) -> int:
    """Print the report and write the requested files. Returns the exit code. Raises DoctorError."""
    check(options)
    if options.html is not None:
        html.require_jinja()
    prompts = load(options.prompts, options.max_prompts)
    with Reporter() as reporter:
        reporter.log("connecting" if options.servers else "loading both models")
        pair = open_pair(options)
        try:
            make = _sweep if options.sweep else _compare
            report = make(pair, prompts, options, reporter)
        finally:
            pair.close()
    if report is None:
        return EXIT_INTERRUPTED
    if options.json is not None:
        _write(options.json, "--json", json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    if options.plan is not None:
        plan = msgspec.convert(report["prescription"]["plan"], Plan)
        _write(options.plan, "--plan", encode_plan(plan))
    if options.html is not None:
        _write(options.html, "--html", html.render(report))
    show(sweep_terminal.render(report) if options.sweep else terminal.render(report))
    return 0


def show(report: RenderableType) -> None:
    """Print it as it is: names of models and texts may have what rich takes for markup (`[/INST]`)."""
    width = None if Console().is_terminal else PLAIN_WIDTH
    Console(width=width, markup=False, emoji=False).print(report)


def open_pair(options: DoctorOptions) -> Pair:
    """Raises DoctorError when a model cannot be loaded or reached, or when the vocabularies differ."""
    if options.servers:
        from hemostat_lab.doctor.servers import ServerPair  # noqa: PLC0415

        return ServerPair(options)
    if packages.missing("transformers"):
        # With the extra for quantized checkpoints: one of two nearly always is, and it has the others, too.
        raise DoctorError(f"{packages.missing('lab')}, or name two vLLM servers")
    from hemostat_lab.doctor.checkpoints import CheckpointPair  # noqa: PLC0415  torch only where it is needed

    return CheckpointPair(options)


def _sweep(pair: Pair, prompts: Sequence[Prompt], options: DoctorOptions, reporter: Reporter) -> dict[str, Any] | None:
    """The report of a sweep; None when it was interrupted."""
    from hemostat_lab.doctor.checkpoints import CheckpointPair  # noqa: PLC0415
    from hemostat_lab.doctor.sweep.run import run_sweep, sweep_jobs, sweep_key  # noqa: PLC0415

    assert isinstance(pair, CheckpointPair)
    jobs = sweep_jobs(pair, prompts, options)

    def make(work: WorkFolder) -> dict[str, Any]:
        return run_sweep(pair, jobs, options, work, reporter)

    return _in_work_folder(sweep_key(pair, jobs, options), "sweep", options, reporter, make)


def _compare(
    pair: Pair, prompts: Sequence[Prompt], options: DoctorOptions, reporter: Reporter
) -> dict[str, Any] | None:
    """The report on both models; None when it was interrupted."""
    jobs = encode(pair, prompts, options)

    def make(work: WorkFolder) -> dict[str, Any]:
        scored = _score(pair, jobs, options, work, reporter)
        inside = {
            **_layers(pair, jobs, scored, options, work, reporter),
            "prescription": _prescription(pair, jobs, scored, options, work, reporter),
        }
        return _assemble(pair, prompts, jobs, scored, inside, options)

    return _in_work_folder(_key(pair, jobs, options), "doctor", options, reporter, make)


def _in_work_folder(
    key: Mapping[str, Any],
    program: str,
    options: DoctorOptions,
    reporter: Reporter,
    make: Callable[[WorkFolder], dict[str, Any]],
) -> dict[str, Any] | None:
    """What `make` returns; None when it was interrupted. Raises WorkFolderError."""
    folder = options.work or cache_folder() / "doctor" / cache_key(key)
    with WorkFolder(folder, key, program) as work:
        try:
            report = make(work)
        except KeyboardInterrupt:
            reporter.log(f"interrupted: finished work is in {folder}; the same command continues from it")
            return None
        finally:
            for note in work.notes:
                reporter.log(note)
        if options.work is None:
            # Token ids can be decoded to text: they stay on disk only if the user named a folder.
            work.remove()
    return report


def _key(pair: Pair, jobs: Sequence[Job], options: DoctorOptions) -> dict[str, Any]:
    """Everything that stored results depend on."""
    libraries = () if options.servers else ("torch", "transformers")
    return {
        "hemostat": __version__,
        **{name: importlib.metadata.version(name) for name in libraries},
        "reference": pair.reference.digest,
        "compressed": pair.compressed.digest,
        "reference dtype": pair.reference.dtype,
        "compressed dtype": pair.compressed.dtype,
        "prompts and --tokens": jobs_digest(jobs),
        "--greedy or --given": options.decoding,
        "--seed": options.seed,
        "--batch": options.batch,
        "--device": options.device,
        "--top-k": options.top_k if options.servers else None,
        "--layer-tokens": None if options.servers else options.layer_tokens,
    }


def _score(
    pair: Pair, jobs: Sequence[Job], options: DoctorOptions, work: WorkFolder, reporter: Reporter
) -> list[Scored]:
    scored: list[Scored] = []
    for number, begin in enumerate(range(0, len(jobs), options.batch)):
        reporter.step(PROMPT_STAGE, begin, len(jobs))
        name = f"prompts-{number:06d}"
        data = work.get(name)
        if data is None:
            batch = pair.score(jobs[begin : begin + options.batch], options.seed, options.decoding == "greedy")
            data = pack(batch)
            work.put(name, data)
        scored += unpack(data)
    reporter.step(PROMPT_STAGE, len(jobs), len(jobs))
    return scored


def _layers(
    pair: Pair, jobs: Sequence[Job], scored: Sequence[Scored], options: DoctorOptions, work: WorkFolder,
    reporter: Reporter,
) -> dict[str, Any]:  # fmt: skip
    """The report's `layers`, `outliers` and `routing`."""
    if options.servers or not options.layer_tokens:
        skipped = {"skipped": NO_LAYERS if options.servers else "--layer-tokens 0"}
        return {"layers": skipped, "outliers": skipped, "routing": skipped}
    from hemostat_lab.doctor.causes.layers import layer_report  # noqa: PLC0415
    from hemostat_lab.doctor.causes.outliers import outlier_report  # noqa: PLC0415
    from hemostat_lab.doctor.causes.routing import routing_report  # noqa: PLC0415
    from hemostat_lab.doctor.causes.units import Incomparable  # noqa: PLC0415
    from hemostat_lab.doctor.checkpoints import CheckpointPair  # noqa: PLC0415
    from hemostat_lab.doctor.kl_meter import Text, choose  # noqa: PLC0415

    assert isinstance(pair, CheckpointPair)
    texts = choose([Text(jobs[text.index].prompt, text.output) for text in scored], options.layer_tokens)
    try:
        layers = layer_report(pair, texts, work, lambda done, total: reporter.step(LAYER_STAGE, done, total))
        return {"layers": layers, "outliers": outlier_report(pair, texts), "routing": routing_report(pair, texts)}
    except Incomparable as reason:
        return {name: {"skipped": str(reason)} for name in ("layers", "outliers", "routing")}


def _prescription(
    pair: Pair, jobs: Sequence[Job], scored: Sequence[Scored], options: DoctorOptions, work: WorkFolder,
    reporter: Reporter,
) -> dict[str, Any]:  # fmt: skip
    if not options.prescribes:
        return {"skipped": NO_LAYERS if options.servers else "not asked for: --prescribe, --plan FILE or --budget"}
    from hemostat_lab.doctor.checkpoints import CheckpointPair  # noqa: PLC0415
    from hemostat_lab.doctor.kl_meter import Text  # noqa: PLC0415
    from hemostat_lab.doctor.prescription.report import prescription_report  # noqa: PLC0415

    assert isinstance(pair, CheckpointPair)
    texts = [Text(jobs[text.index].prompt, text.output) for text in scored]
    return prescription_report(
        pair, texts, options, work, lambda done, total: reporter.step(PRESCRIPTION_STAGE, done, total)
    )


def _assemble(
    pair: Pair, prompts: Sequence[Prompt], jobs: Sequence[Job], scored: Sequence[Scored], inside: dict[str, Any],
    options: DoctorOptions,
) -> dict[str, Any]:  # fmt: skip
    """inside: `layers`, `outliers`, `prescription`."""
    texts = pair.texts(sorted({int(token) for text in scored for token in text.output}))
    classes = classify_all(texts, pair.special())
    report = {
        "schema": SCHEMA,
        "hemostat": __version__,
        "reference": _side(pair.reference),
        "compressed": _side(pair.compressed),
        "vocab_size": pair.vocab_size,
        "full_vocabulary": pair.full_vocabulary,
        "top_k": None if pair.full_vocabulary else options.top_k,
        "prompt_file": "packaged" if options.prompts is None else options.prompts.name,
        "texts": decoding_of(jobs, options.decoding),
        "seed": options.seed,
        "max_new_tokens": options.tokens,
        "notes": [*pair.notes, *([OWN_TEXT] if any(job.output is None for job in jobs) else [])],
        **tables(
            scored,
            classes,
            [prompt.line for prompt in prompts],
            options.worst,
            {job.index: options.decoding if job.output is None else "given" for job in jobs},
            {job.index: PromptKind(prompts[job.index].messages is not None, len(job.prompt)) for job in jobs},
        ),
        **inside,
    }
    report["findings"] = findings(report)
    if options.show_text:
        _add_text(report, prompts, scored, texts)
    return report


def _side(side: Side) -> dict[str, str]:
    return {"name": side.name, "digest": side.digest, "dtype": side.dtype}


def _add_text(
    report: dict[str, Any], prompts: Sequence[Prompt], scored: Sequence[Scored], texts: Mapping[int, str]
) -> None:
    """For `--show-text`: `text`, and the text before a worst token."""
    outputs = {text.index: text.output.tolist() for text in scored}
    for row in report["worst_tokens"]:
        before = outputs[row["prompt"]][max(0, row["position"] - 12) : row["position"]]
        row["text"] = texts[row["token_id"]]
        row["before"] = "".join(texts[token] for token in before)
    for row in report["worst_prompts"]:
        row["text"] = prompts[row["prompt"]].display_text


def _write(path: Path, flag: str, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DoctorError(f"{flag}: {path} cannot be written ({error.strerror})") from None
