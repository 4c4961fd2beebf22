"""Checks habits of language in docstrings and guides: `make lint` runs it.

A sentence has a subject and a verb, so a docstring does not begin with "Of", "What" or "Whether", and a thing is named
again in place of "that of". `language_cases.txt` lists the cases that were there when the checker came. Anything else
is an error, and so is a listed case that is gone: the list only shrinks. `--shrink` removes such cases from it.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CASES = Path(__file__).with_name("language_cases.txt")
CODE = ("middleware", "calibration", "deploy", "tests")

_FRAGMENT = re.compile(
    r"(Also|As|At|Beside|Besides|Between|By|For|From|How|In|Of|On|Per|So|That|Those|Until|What|Whatever|When|Where|Whether|Which|"
    r"Who|Whom|Whose|Why|With|Without)\b"
)
"""A docstring that begins with one of these words has no subject, with a few exceptions, which `_SENTENCE` knows."""
_SENTENCE = re.compile(r"(?:Between|By|For|From|In|On|Until|When|Where|With|Without|At|As)\b[^.:;]*, \w|So that\b")
"""A clause, a comma and the main clause: "With none, there is no limit." """
_POINTER = re.compile(r"\b(?:that|those) of\b|(?<!--)\bbeside\b", re.IGNORECASE)
"""A command's option `--beside` is no use of the word."""
_ADVICE = {
    "fragment": 'say what the thing is or does: "Returns …", "The share of …"',
    "pointer": 'name the thing again in place of "that of" and "those of"; "next to" or "in addition to" in place of '
    '"beside"',
}


@dataclass(frozen=True, slots=True)
class Case:
    """One use of a habit. Its text, not its place, identifies it, so that files can be moved."""

    habit: str
    text: str
    place: str

    @property
    def entry(self) -> str:
        """The line of the case in the list."""
        return f"{self.habit}: {self.text}"


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields the line and the text of each docstring, also of attributes."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        before: ast.stmt | None = None
        for statement in node.body:
            documents = before is None or isinstance(before, ast.Assign | ast.AnnAssign)
            match statement:
                case ast.Expr(value=ast.Constant(value=str(text))) if documents:
                    yield statement.lineno, text
            before = statement


def in_text(text: str, place: str, *, docstring: bool) -> Iterator[Case]:
    """Yields the cases of one docstring, or of one paragraph of a guide."""
    flat = " ".join(text.split())
    if docstring and _FRAGMENT.match(flat) and not _SENTENCE.match(flat):
        yield Case("fragment", flat[:80], place)
    for found in _POINTER.finditer(flat):
        yield Case("pointer", flat[max(0, found.start() - 30) : found.end() + 30], place)


def in_code(path: Path, root: Path = ROOT) -> Iterator[Case]:
    """Yields the cases of a Python file."""
    for line, text in docstrings(ast.parse(path.read_text(encoding="utf-8"))):
        yield from in_text(text, f"{path.relative_to(root)}:{line}", docstring=True)


def in_guide(path: Path, root: Path = ROOT) -> Iterator[Case]:
    """Yields the cases of a Markdown file, without its code."""
    text = re.sub(
        r"^ *```.*?^ *```", lambda code: "\n" * code[0].count("\n"), path.read_text(encoding="utf-8"), flags=re.M | re.S
    )
    for number, line in enumerate(text.splitlines(), 1):
        yield from in_text(re.sub(r"`[^`]*`", "`code`", line), f"{path.relative_to(root)}:{number}", docstring=False)


def all_cases(root: Path = ROOT) -> list[Case]:
    """Returns the cases of all code and of the guides."""
    code = [path for folder in CODE for path in sorted((root / folder).rglob("*.py"))]
    named = [root / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
    guides = [*named, *sorted((root / "docs").glob("*.md"))]
    return [case for path in code for case in in_code(path, root)] + [
        case for path in guides for case in in_guide(path, root)
    ]


def compare(cases: list[Case], listed: Counter[str]) -> tuple[list[Case], Counter[str]]:
    """Returns the cases that are not listed, and the listed entries that are gone."""
    left = listed.copy()
    new = []
    for case in cases:
        if left[case.entry]:
            left[case.entry] -= 1
        else:
            new.append(case)
    return new, +left


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def main(arguments: list[str]) -> int:
    """Prints what is wrong; returns the exit code."""
    cases = all_cases()
    listed = Counter(CASES.read_text(encoding="utf-8").splitlines())
    new, gone = compare(cases, listed)
    for case in new:
        _say(f"{case.place}: {case.text!r}: {_ADVICE[case.habit]}")
    if arguments == ["--shrink"]:
        entries = sorted((listed - gone).elements())
        CASES.write_text("".join(f"{entry}\n" for entry in entries), encoding="utf-8")
        _say(f"{gone.total()} cases removed from {CASES.relative_to(ROOT)}, {len(entries)} are left")
        return 1 if new else 0
    if gone:
        _say(
            f"{gone.total()} listed cases are gone, such as {next(iter(gone))!r}: "
            "run `.venv/bin/python deploy/language.py --shrink` and commit the list"
        )
    return 1 if new or gone else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
