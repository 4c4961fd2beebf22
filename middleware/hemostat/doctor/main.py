"""The doctor's course: load, score prompt by prompt, go through the layers, write the report."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from hemostat import __version__
from hemostat.doctor import html, report, terminal
from hemostat.doctor.classes import classify_all
from hemostat.doctor.options import DoctorError, DoctorOptions, check
from hemostat.doctor.pair import Job, Pair, Scored, Side, decoding_of, encode, jobs_digest, pack, unpack
from hemostat.doctor.progress import Reporter
from hemostat.doctor.prompts import Prompt, load
from hemostat.doctor.work import WorkFolder
from hemostat.models.compress import cache_folder

INTERRUPTED = 130
PLAIN_WIDTH = 120
"""Columns where there is no terminal to ask."""
OWN_TEXT = "Q wrote the text itself: PPL(Q) below PPL(base) is no merit; for perplexity, score given text (--given)"
SCORING, LAYERS = "prompts", "layers"


def run(options: DoctorOptions) -> int:
    """Make the report: on the terminal, and in the files asked for. Returns the exit code; raises DoctorError."""
    check(options)
    prompts = load(options.prompts, options.max_prompts)
    with Reporter() as reporter:
        reporter.say("connecting" if options.servers else "loading both models")
        pair = open_pair(options)
        try:
            made = _made(pair, prompts, options, reporter)
        finally:
            pair.close()
    if made is None:
        return INTERRUPTED
    if options.json is not None:
        _write(options.json, "--json", json.dumps(made, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    if options.html is not None:
        _write(options.html, "--html", html.page(made))
    console = Console()
    if not console.is_terminal:
        console = Console(width=PLAIN_WIDTH)
    console.print(terminal.picture(made))
    return 0


def open_pair(options: DoctorOptions) -> Pair:
    """Raises DoctorError when the models cannot be had or do not speak the same tokens."""
    if options.servers:
        from hemostat.doctor.servers import ServerPair  # noqa: PLC0415

        return ServerPair(options)
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise DoctorError(
            f"not installed: {', '.join(missing)}; pip install 'hemostat[transformers]', or name two vLLM servers"
        )
    from hemostat.doctor.checkpoints import CheckpointPair  # noqa: PLC0415  torch only where it is needed

    return CheckpointPair(options)


def _made(pair: Pair, prompts: Sequence[Prompt], options: DoctorOptions, reporter: Reporter) -> dict[str, Any] | None:
    """The report; None when it was interrupted."""
    jobs = encode(pair, prompts, options)
    key = _key(pair, jobs, options)
    folder = options.work or cache_folder() / "doctor" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    with WorkFolder(folder, key) as work:
        try:
            scored = _scored(pair, jobs, options, work, reporter)
            layers = _layers(pair, jobs, scored, options, work, reporter)
            made = _report(pair, prompts, jobs, scored, layers, options)
        except KeyboardInterrupt:
            reporter.say(f"interrupted: what is finished is kept in {folder}; the same command goes on from there")
            return None
        finally:
            for note in work.notes:
                reporter.say(note)
        if options.work is None:
            # Token ids are text: they stay only where the user named a place for them.
            work.remove()
    return made


def _key(pair: Pair, jobs: Sequence[Job], options: DoctorOptions) -> dict[str, Any]:
    """Everything that the kept figures depend on."""
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


def _scored(
    pair: Pair, jobs: Sequence[Job], options: DoctorOptions, work: WorkFolder, reporter: Reporter
) -> list[Scored]:
    scored: list[Scored] = []
    for number, begin in enumerate(range(0, len(jobs), options.batch)):
        reporter.step(SCORING, begin, len(jobs))
        name = f"prompts-{number:06d}"
        data = work.get(name)
        if data is None:
            batch = pair.score(jobs[begin : begin + options.batch], options.seed, options.decoding == "greedy")
            data = pack(batch)
            work.put(name, data)
        scored += unpack(data)
    reporter.step(SCORING, len(jobs), len(jobs))
    return scored


def _layers(
    pair: Pair, jobs: Sequence[Job], scored: Sequence[Scored], options: DoctorOptions, work: WorkFolder,
    reporter: Reporter,
) -> dict[str, Any]:  # fmt: skip
    if options.servers:
        return {"skipped": "a server does not show its layers"}
    if not options.layer_tokens:
        return {"skipped": "--layer-tokens 0"}
    from hemostat.doctor.checkpoints import CheckpointPair  # noqa: PLC0415
    from hemostat.doctor.layers import Incomparable, Text, choose, layer_report  # noqa: PLC0415

    assert isinstance(pair, CheckpointPair)
    texts = choose([Text(jobs[one.index].prompt, one.output) for one in scored], options.layer_tokens)
    try:
        return layer_report(pair, texts, work, lambda done, total: reporter.step(LAYERS, done, total))
    except Incomparable as reason:
        return {"skipped": str(reason)}


def _report(
    pair: Pair, prompts: Sequence[Prompt], jobs: Sequence[Job], scored: Sequence[Scored], layers: dict[str, Any],
    options: DoctorOptions,
) -> dict[str, Any]:  # fmt: skip
    texts = pair.texts(sorted({int(token) for one in scored for token in one.output}))
    classes = classify_all(texts, pair.special())
    made = {
        "schema": report.SCHEMA,
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
        **report.tables(
            scored,
            classes,
            [prompt.line for prompt in prompts],
            options.worst,
            {job.index: options.decoding if job.output is None else "given" for job in jobs},
        ),
        "layers": layers,
    }
    if options.show_text:
        _add_text(made, prompts, scored, texts)
    return made


def _side(side: Side) -> dict[str, str]:
    return {"name": side.name, "digest": side.digest, "dtype": side.dtype}


def _add_text(
    made: dict[str, Any], prompts: Sequence[Prompt], scored: Sequence[Scored], texts: Mapping[int, str]
) -> None:
    """Only where the user asked for it: `text`, and what came before a worst token."""
    outputs = {one.index: one.output.tolist() for one in scored}
    for row in made["worst_tokens"]:
        before = outputs[row["prompt"]][max(0, row["position"] - 12) : row["position"]]
        row["text"] = texts[row["token_id"]]
        row["before"] = "".join(texts[token] for token in before)
    for row in made["worst_prompts"]:
        row["text"] = prompts[row["prompt"]].shown


def _write(path: Path, flag: str, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DoctorError(f"{flag}: {path} cannot be written ({error.strerror})") from None
