"""The core imports nothing that does IO, tells the time or rolls dice, and nothing of the shell around it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hemostat_calibration

ROOT = Path(hemostat_calibration.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
ALLOWED = {
    "__future__",
    "base64",
    "bisect",
    "collections",
    "dataclasses",
    "enum",
    "functools",
    "hashlib",
    "hmac",
    "heapq",
    "itertools",
    "hemostat_calibration",
    "json",
    "math",
    "numpy",
    "re",
    "safetensors",
    "statistics",
    "struct",
    "types",
    "typing",
    "zlib",
}
FORBIDDEN_NAMES = {"open", "print", "input", "exec", "eval", "__import__"}


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_imports(path):
    tree = ast.parse(path.read_text())
    for name in imported(tree):
        assert name.split(".")[0] in ALLOWED, name
        assert not name.startswith(("numpy.random", "hemostat_engine")), name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            assert not (node.attr == "random" and isinstance(node.value, ast.Name) and node.value.id == "np")
            assert node.attr not in {"load_file", "save_file", "tofile", "fromfile", "memmap"}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_NAMES


def test_the_modules_are_found():
    assert {"records.py", "per_token.py", "guard.py"} <= {path.name for path in MODULES}


def test_importing_all_of_it_loads_nothing_heavy():
    names = [path.relative_to(ROOT.parent).with_suffix("").parts for path in MODULES if path.stem != "__init__"]
    modules = ",".join(".".join(parts) for parts in names)
    code = (
        f"import {modules}, sys; print([m for m in ('torch', 'vllm', 'transformers', 'hemostat') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
