"""Pruned and repaired checkpoints for `make bench-compress`, and what must hold between them.

All are made from the same texts. `MUSTS` compare the mean KL(reference‖·) of the same held-out texts, text by text.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hemostat.models.adapters.texts import Text
from hemostat.models.compression.compress import Surroundings, compress_with
from hemostat.models.compression.pruning.masks import Pattern, Score
from hemostat.models.compression.pruning.method import Budget, PruneOptions, prune_method
from hemostat.models.compression.repair import write_repaired_copy

SCRIPT = Path(__file__).with_name("llmcompressor_pruning.py")
UNSTRUCTURED = (0.3, 0.5, 0.6)
ROWS = (0.2, 0.3)


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
    """Write the checkpoint; nothing is done where it is there."""
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
    if folder.exists():
        return
    partial = folder.with_name(f"{folder.name}.part")
    partial.mkdir(parents=True, exist_ok=True)
    given = partial / "texts.json"
    given.write_text(json.dumps([text.ids.tolist() for text in texts]), encoding="utf-8")
    command = [python, SCRIPT, method, reference, partial, given, str(sparsity), pattern]
    with folder.with_name(f"{folder.name}.log").open("wb") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)
    given.unlink()
    partial.rename(folder)


def repair_all(
    checkpoints: Mapping[str, Path], reference: Path, folder: Path, texts: Sequence[Text]
) -> dict[str, Path]:
    """Repaired copies, by `repaired NAME`; the texts, prompts included, are those that the training may see."""
    found = {}
    for label, checkpoint in checkpoints.items():
        found[f"repaired {label}"] = folder / f"repaired-{checkpoint.name}"
        write_repaired_copy(reference, checkpoint, found[f"repaired {label}"], texts)
    return found
