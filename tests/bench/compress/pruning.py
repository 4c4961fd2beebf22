"""Pruned and repaired checkpoints: KL(r‖c) over the whole vocabulary, on held-out topics; what must hold between them.

All are made from the same texts, which the reference wrote on other topics. `python -m tests.bench.compress.pruning`
prints the rows by itself; `--only TEXT …` those whose names contain one of the texts.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tests.bench.compress.texts import first_by_topic, written_texts
from tests.bench.recovery.prompts import open_ended
from transformers import AutoModelForCausalLM, AutoTokenizer

from hemostat.doctor.kl_meter import KlMeter
from hemostat.models.adapters.copies import Copy
from hemostat.models.adapters.texts import Text
from hemostat.models.compression.compress import Surroundings, compress_with
from hemostat.models.compression.pruning.masks import Pattern, Score
from hemostat.models.compression.pruning.method import Budget, PruneOptions, prune_method
from hemostat.models.compression.repair import write_repaired_copy
from hemostat.models.reference_checkpoint import cached_checkpoints

NAME = "pruning"
SCRIPT = Path(__file__).with_name("llmcompressor_pruning.py")
UNSTRUCTURED = (0.3, 0.5, 0.6)
ROWS = (0.2, 0.3)


Make = Callable[[Path], None]
"""Writes a checkpoint to a folder that does not exist yet."""


@dataclass(frozen=True, slots=True)
class Row:
    """kl: nats per token, of a checkpoint; or of the second one minus that of the first. half_width: 95 %, by topic."""

    case: str
    kl: float
    half_width: float
    tokens: int
    topics: int
    holds: bool = True


@dataclass(frozen=True, slots=True)
class Must:
    """`better` is below `worse`, with a 95 % interval of the difference that does not reach 0; not_above: or it may be
    equal, so that only an interval above 0 breaks it."""

    better: str
    worse: str
    not_above: bool = False


def pruned_variants() -> dict[str, PruneOptions]:
    """By name, such as `50 % fisher compensated`."""
    found: dict[str, PruneOptions] = {}
    for sparsity in UNSTRUCTURED:
        for score in Score:
            for compensate in (False, True):
                found[name(sparsity, score, compensate)] = PruneOptions(sparsity, score, compensate=compensate)
    for score in (Score.MAGNITUDE, Score.TAYLOR, Score.FISHER):
        for compensate in (False, True):
            options = PruneOptions(0.5, score, budget=Budget.GLOBAL, compensate=compensate)
            found[f"{name(0.5, score, compensate)}, global"] = options
    for score in Score:
        for compensate in (False, True):
            options = PruneOptions(0.5, score, Pattern.TWO_OF_FOUR, compensate=compensate)
            found[f"2:4 {name(0.5, score, compensate)}"] = options
    for sparsity in ROWS:
        for score in Score:
            for compensate in (False, True):
                options = PruneOptions(sparsity, score, Pattern.ROWS, compensate=compensate)
                found[f"rows {name(sparsity, score, compensate)}"] = options
    return found


def musts() -> list[Must]:
    best = {sparsity: name(sparsity, Score.FISHER, True) for sparsity in UNSTRUCTURED}
    found = [Must(best[sparsity], name(sparsity, Score.MAGNITUDE, False)) for sparsity in UNSTRUCTURED]
    return found + [
        Must(best[0.5], f"llmcompressor {method} 50 %", not_above=True) for method in ("sparsegpt", "wanda")
    ]


def name(sparsity: float, score: Score, compensate: bool) -> str:
    return f"{sparsity:.0%} {score}{' compensated' if compensate else ''}".replace("%", " %")


def prune(options: PruneOptions, reference: Path, folder: Path, texts: Sequence[Text], seed: int = 0) -> None:
    """Write the checkpoint."""
    compress_with(
        reference,
        folder,
        prune_method(options),
        [text.ids for text in texts],
        seed=seed,
        surroundings=Surroundings(folder.with_name(f"{folder.name}.work")),
    )


def prune_by_llmcompressor(
    method: str, sparsity: float, pattern: Pattern, reference: Path, folder: Path, texts: Sequence[Text], python: Path
) -> None:
    """method: sparsegpt or wanda. python: of an environment that has llmcompressor. Its log is beside the folder."""
    folder.mkdir()
    given = folder / "texts.json"
    given.write_text(json.dumps([text.ids.tolist() for text in texts]), encoding="utf-8")
    command = [python, SCRIPT, method, reference, folder, given, str(sparsity), pattern]
    with folder.with_name(f"{folder.name}.log").open("wb") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)
    given.unlink()


def checkpoints(reference: Path, texts: Sequence[Text], python: Path | None, folder: Path) -> dict[str, Make]:
    """How each checkpoint is made, by name; a repaired one from a folder of another one, which comes before it."""
    found: dict[str, Make] = {
        label: partial(prune, options, reference, texts=texts) for label, options in pruned_variants().items()
    }
    if python is not None:
        for method in ("sparsegpt", "wanda"):
            for label, pattern in (("50 %", Pattern.UNSTRUCTURED), ("2:4", Pattern.TWO_OF_FOUR)):
                found[f"llmcompressor {method} {label}"] = partial(
                    prune_by_llmcompressor, method, 0.5, pattern, reference, texts=texts, python=python
                )
    pruned = name(0.5, Score.FISHER, True)
    sources = {"w4a16": cached_checkpoints("w4a16").compressed, pruned: folder / folder_name(pruned)}
    for label, source in sources.items():
        found[f"repaired {label}"] = partial(_repair, reference, source, texts)
    return found


def rows(
    learned: int, held_out: int, tokens: int, only: Sequence[str] = (), python: Path | None = None, seed: int = 0
) -> Iterator[Row]:
    """learned, held_out: number of texts, one for each topic as long as there are topics. tokens: of each text."""
    reference = cached_checkpoints().reference
    model = AutoModelForCausalLM.from_pretrained(reference, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(reference)
    prompts = open_ended()
    written = written_texts(model, tokenizer, first_by_topic(prompts, False)[:learned], tokens, seed)
    texts = [Text(text.prompt, text.output) for text in written]
    held = written_texts(model, tokenizer, first_by_topic(prompts, True)[:held_out], tokens, seed + 1)
    meter = KlMeter(model, held, model.device, model.config.vocab_size)
    with torch.inference_mode():
        meter.prepare()
    del model
    found: dict[str, Any] = {"w4a16": _measure(meter, cached_checkpoints("w4a16").compressed)}
    with tempfile.TemporaryDirectory(prefix="hemostat-bench-") as scratch:
        for label, make in checkpoints(reference, texts, python, Path(scratch)).items():
            if not only or any(text in label for text in only):
                folder = Path(scratch) / folder_name(label)
                make(folder)
                found[label] = _measure(meter, folder)
                mean = meter.sample.mean(found[label])
                yield Row(label, mean.value, 1.96 * mean.by_request, len(found[label]), len(held))
    for must in musts():
        if must.better in found and must.worse in found:
            more = meter.sample.mean(found[must.worse] - found[must.better])
            half = 1.96 * more.by_request
            holds = more.value > -half if must.not_above else more.value > half
            case = f"{must.better} {'not above' if must.not_above else 'below'} {must.worse}"
            yield Row(case, more.value, half, len(found[must.worse]), len(held), bool(holds))
    for label, values in found.items():
        if label.startswith("repaired "):
            gain = meter.sample.mean(found[label.removeprefix("repaired ")] - values)
            half = 1.96 * gain.by_request
            yield Row(f"{label}: KL won back", gain.value, half, len(values), len(held), bool(gain.value > half))


def folder_name(label: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in label)


def _measure(meter: KlMeter, folder: Path) -> Any:
    gc.collect()
    with torch.inference_mode():
        return meter.measure(Copy.load(folder).model)


def _repair(reference: Path, compressed: Path, texts: Sequence[Text], folder: Path) -> None:
    report = write_repaired_copy(reference, compressed, folder, texts)
    print(json.dumps(report), file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learned", type=int, default=40, help="texts that checkpoints are made from")
    parser.add_argument("--held-out", type=int, default=30, help="texts that they are measured on")
    parser.add_argument("--tokens", type=int, default=48, help="written by the reference, of each text")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT")
    parser.add_argument("--llmcompressor", type=Path, metavar="PYTHON", help="of an environment that has it")
    arguments = parser.parse_args(argv)
    kept = True
    for row in rows(arguments.learned, arguments.held_out, arguments.tokens, arguments.only, arguments.llmcompressor):
        print(json.dumps(asdict(row)), flush=True)
        kept &= row.holds
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
