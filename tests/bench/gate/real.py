"""A row of the gate on real vLLM servers with SmolLM2-135M-Instruct (docs/results.md, "The gate").

`python -m tests.bench.gate.real descent` makes the checkpoints that the row names, writes the prompts, starts both
servers, runs `hemostat gate`, and prints its verdict with the mean of each question. All of it is in the folder `gate`
of Hemostat's cache folder, with the evidence so far, so that the same command goes on after `--within` or a kill.

The prompts are docstrings of Python's standard library, each with a question after it. Text that people wrote for
different functions has little in common, so that the gate asks nearly all of them; it asks one of the variants of a
template. The docstring comes first since the gate compares the beginnings of prompts. Another version of Python has
other docstrings: the digest of the file is printed.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import platform
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hemostat.cli import main as hemostat
from hemostat.gate.asked import Prompt
from hemostat_lab.demo.checkpoints import cached_checkpoints
from hemostat_lab.demo.vllm_server import VllmServer, dtype
from hemostat_lab.models.checkpoint_folders import cache_folder

PROMPTS, MAX_TOKENS = 800, 16
CHARACTERS = 200, 500
"""The least and the largest length of a docstring that is asked about."""
QUESTIONS = {
    "summary": "In one sentence, for whom is this useful?",
    "example": "Write a short example that uses it.",
    "mistake": "Name a mistake that people make with it.",
}
"""The question after the docstring, by the kind of the prompt."""
_NO_LIBRARY = frozenset({"site-packages", "test", "tests", "idlelib", "lib2to3"})
"""Folders in which no docstring of the library itself is."""
TEXTS = "calibration.jsonl"
READY_SECONDS = 900.0
ARGUMENTS = ("--enforce-eager", "--max-model-len", "2048", "--dtype")

CHECKPOINTS: Mapping[str, Sequence[str]] = {
    "nearest": ("--scheme", "w4a16", "--calibrate", "none"),
    "gptq": ("--scheme", "w4a16", "--calibrate", "gptq", "--tokens", "8000"),
    "descent": ("--scheme", "w4a16", "--calibrate", "descent", "--tokens", "8000"),
}
"""The options with which `hemostat compress` makes each checkpoint from the original. Texts are docstrings that are not
asked about."""


@dataclass(frozen=True)
class Row:
    """The two checkpoints, and what is expected. arguments: of vLLM, for the candidate. gate: of `hemostat gate`."""

    stable: str
    candidate: str
    expect: str
    arguments: tuple[str, ...] = ()
    gate: tuple[str, ...] = ()


ROWS = {
    "descent": Row("nearest", "descent", "other"),
    "nearest": Row("descent", "nearest", "other"),
    "gptq": Row("nearest", "gptq", "other"),
    "fp8-kv": Row("gptq", "gptq", "other", ("--kv-cache-dtype", "fp8")),
    "fp8-kv-same": Row("gptq", "gptq", "same", ("--kv-cache-dtype", "fp8")),
    "restarted": Row("gptq", "gptq", "same", ("--max-num-seqs", "4", "--block-size", "64")),
}


def docstrings() -> Iterator[str]:
    """Yields the docstrings of all functions and classes of the standard library's modules."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if _NO_LIBRARY.intersection(path.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield ast.get_docstring(node) or ""


def chosen(texts: Iterable[str]) -> list[str]:
    """Returns the texts of the right length in the order of their digests, whatever order they come in."""
    least, most = CHARACTERS
    fitting = {text for text in texts if least <= len(text) <= most}
    return sorted(fitting, key=lambda text: hashlib.sha256(text.encode()).digest())


def prompts(texts: Sequence[str]) -> list[Prompt]:
    """Returns prompts about the first `PROMPTS` texts, of all kinds by turns."""
    kinds = list(QUESTIONS)
    return [_prompt(text, kinds[number % len(kinds)]) for number, text in enumerate(texts[:PROMPTS])]


def calibration(texts: Sequence[str]) -> list[dict[str, str]]:
    """Returns the other texts as `hemostat compress --prompts` takes them, so that no model has to write any."""
    at = CHARACTERS[0] // 2
    return [{"prompt": text[:at], "completion": text[at:]} for text in texts[PROMPTS:]]


def _prompt(text: str, kind: str) -> Prompt:
    line = {"messages": [{"role": "user", "content": f"{text}\n\n{QUESTIONS[kind]}"}], "kind": kind}
    return msgspec.convert(line | {"max_tokens": MAX_TOKENS}, Prompt)


def checkpoint(name: str, original: Path, folder: Path) -> Path:
    """Returns the folder of the checkpoint, which is made if it is not there."""
    made = folder / f"w4a16-{name}"
    if not (made / "config.json").is_file():
        texts = () if "none" in CHECKPOINTS[name] else ("--prompts", str(folder / TEXTS))
        hemostat(["compress", str(original), str(made), *CHECKPOINTS[name], *texts])
    return made


@contextmanager
def serving(models: Mapping[str, tuple[Path, Sequence[str]]], folder: Path) -> Iterator[dict[str, str]]:
    """Yields the URLs of vLLM servers, by name. models: the checkpoint of each, and its own arguments."""
    servers = {
        name: VllmServer(model, name, folder / f"vllm-{name}.log", [*ARGUMENTS, dtype(), *arguments])
        for name, (model, arguments) in models.items()
    }
    try:
        for server in servers.values():
            server.start()
        for server in servers.values():
            server.wait_ready(READY_SECONDS, progress=print)
        yield {name: server.url for name, server in servers.items()}
    finally:
        for server in servers.values():
            server.stop()


def run(name: str, within: str) -> int:
    """Returns the exit code of `hemostat gate`."""
    row, folder = ROWS[name], cache_folder() / "gate"
    folder.mkdir(parents=True, exist_ok=True)
    original = cached_checkpoints(progress=print).reference
    asked, result = folder / "prompts.jsonl", folder / f"{name}.json"
    texts, encoder = chosen(docstrings()), msgspec.json.Encoder()
    asked.write_bytes(encoder.encode_lines(prompts(texts)))
    (folder / TEXTS).write_bytes(encoder.encode_lines(calibration(texts)))
    digest = hashlib.sha256(asked.read_bytes()).hexdigest()[:12]
    print(f"{PROMPTS} prompts from Python {platform.python_version()}, digest {digest}")
    reference = ("--reference", str(original)) if row.expect == "other" else ()
    models: dict[str, tuple[Path, Sequence[str]]] = {
        "stable": (checkpoint(row.stable, original, folder), ()),
        "candidate": (checkpoint(row.candidate, original, folder), row.arguments),
    }
    with serving(models, folder) as urls:
        where = ("--stable", urls["stable"], "--candidate", urls["candidate"], "--expect", row.expect, *reference)
        kept = ("--prompts", str(asked), "--state", str(folder / f"{name}.state"), "--json", str(result))
        code = hemostat(["gate", *where, *kept, "--within", within, *row.gate])
    print(json.dumps(json.loads(result.read_text()), indent=1))
    return code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("--within", default="1h", help="as of `hemostat gate`")
    options = parser.parse_args()
    return run(options.row, options.within)


if __name__ == "__main__":
    raise SystemExit(main())
