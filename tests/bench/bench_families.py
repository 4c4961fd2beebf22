"""What equal bits cost two families of transformers: `make bench-families`, a table and build/bench/families.json.

`hemostat doctor` on SmolLM2-135M-Instruct and on Gemma-3-270M (a base model), each with the same compressions of
it, at full vocabulary, on texts that the compressed model samples after the same prompts, as plain text for both.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.support.gemma_checkpoint import gemma_checkpoint  # noqa: E402

from hemostat_lab.compression.checkpoint_writer import compress  # noqa: E402
from hemostat_lab.demo.checkpoints import cached_checkpoints  # noqa: E402
from hemostat_lab.doctor import DoctorOptions, run  # noqa: E402
from hemostat_lab.doctor.causes.findings import half_width  # noqa: E402
from hemostat_lab.doctor.prompts import load  # noqa: E402

BUILD = ROOT / "build" / "bench"
FAMILIES: dict[str, Callable[[], Path]] = {
    "SmolLM2-135M-Instruct": lambda: cached_checkpoints("w4a16", note).reference,
    "Gemma-3-270M": lambda: gemma_checkpoint(note),
}
SCHEMES = ("w4a16", "w8a8")
FIGURES = {
    "Mean    KLD": "KL(r‖c)",
    "Same top p": "same top-1",
    "total variation": "TV",
    "Mean PPL(Q)/PPL(base)": "PPL ratio",
    "noise floor: c in one prefill ‖ c in two": "noise floor",
}


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def measure(family: str, scheme: str, prompts: Path, tokens: int, folder: Path) -> dict[str, Any]:
    reference = FAMILIES[family]()
    compressed = reference.parent / scheme
    compress(reference, compressed, scheme, note, overwrite=True)
    report = folder / "report.json"
    options = DoctorOptions(
        str(reference), str(compressed), prompts=prompts, tokens=tokens, layer_tokens=0, device="cpu", json=report
    )
    with contextlib.redirect_stdout(io.StringIO()):
        assert run(options) == 0
    result = json.loads(report.read_text(encoding="utf-8"))
    rows = {row["name"]: row for key in ("perplexity", "kl_divergence", "divergence", "token_probability")
            for row in result[key]}  # fmt: skip
    figures = {name: {key: rows[name][key] for key in ("value", "se_by_request", "unit")} for name in FIGURES}
    return {"family": family, "scheme": scheme, "requests": result["requests"], "tokens": result["tokens"], **figures}


def line(row: dict[str, Any]) -> str:
    cells = [row["family"], row["scheme"], f"{row['requests']}", f"{row['tokens']}"]
    for name in FIGURES:
        value, error, unit = (row[name][key] for key in ("value", "se_by_request", "unit"))
        half = half_width(error, row["requests"])
        spread = "" if half is None else f" ± {half:.2g}"
        cells.append(f"{value:.3g}{spread}{' %' if unit == '%' else ''}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32, help="at most, for each prompt")
    parser.add_argument("--family", action="append", choices=FAMILIES)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prompts = folder / "prompts.jsonl"
        texts = [prompt.messages[-1]["content"] for prompt in load(None, None) if prompt.messages]
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts[: options.prompts]))
        names = ["family", "scheme", "requests", "tokens", *(f"{name} ± 95 %" for name in FIGURES.values())]
        print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|", flush=True)
        rows = []
        for family in options.family or FAMILIES:
            for scheme in SCHEMES:
                rows.append(measure(family, scheme, prompts, options.tokens, folder))
                print(line(rows[-1]), flush=True)
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "families.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
