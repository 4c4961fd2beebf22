"""Small changes of a source file, found in its syntax tree. The text around a change stays as it is."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

_COMPARED: Mapping[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_COMPUTED: Mapping[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
}
_NOT_ENTERED = (ast.Import, ast.ImportFrom, ast.Assert, ast.JoinedStr)
"""Asserts narrow types for mypy. Python 3.11 gives no positions within an f-string."""
_NOT_ENTERED_FIELDS = ("annotation", "returns", "decorator_list")


@dataclass(frozen=True, slots=True, order=True)
class Mutant:
    """One change of one file. Columns are offsets in bytes of UTF-8, as in `ast`."""

    path: str
    line: int
    column: int
    end_line: int
    end_column: int
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}:{self.column}: {' '.join(self.old.split())} -> {self.new}"


def mutants(path: str, text: str) -> list[Mutant]:
    """Returns all changes of a file, in its order.

    >>> [str(mutant) for mutant in mutants("a.py", "def f(x: int) -> int:\\n    return x + 1\\n")]
    ['a.py:2:11: x + 1 -> (None)', 'a.py:2:11: x + 1 -> (x - 1)', 'a.py:2:15: 1 -> (2)']
    """
    result = []
    for node, new in _replaced(ast.parse(text)):
        old = ast.get_source_segment(text, node)
        assert old is not None
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        changed = ast.unparse(new) if isinstance(new, ast.stmt) else f"({ast.unparse(new)})"
        result.append(Mutant(path, node.lineno, node.col_offset, node.end_lineno, node.end_col_offset, old, changed))
    return sorted(set(result))


def apply(mutant: Mutant, text: str) -> str:
    """Returns the text with the change.

    >>> source = "ä = 1 if a < b else 2\\n"
    >>> apply(mutants("a.py", source)[1], source)
    'ä = 1 if (a <= b) else 2\\n'
    """
    lines = text.encode().splitlines(keepends=True)
    start = sum(map(len, lines[: mutant.line - 1])) + mutant.column
    end = sum(map(len, lines[: mutant.end_line - 1])) + mutant.end_column
    whole = b"".join(lines)
    assert whole[start:end].decode() == mutant.old, f"{mutant.path} is not the text that {mutant} was found in"
    return (whole[:start] + mutant.new.encode() + whole[end:]).decode()


def draw(candidates: Sequence[Mutant], count: int, seed: str, weights: Sequence[float] | None = None) -> list[Mutant]:
    """Returns different candidates, drawn without replacement. weights: their relative probabilities; default: equal.

    Each candidate gets a key u^(1/w); the largest keys are drawn (Efraimidis and Spirakis, 2006).
    """
    source = random.Random(seed)
    keys = [source.random() for _ in candidates]
    if weights is not None:
        keys = [key ** (1 / weight) if weight else -1.0 for key, weight in zip(keys, weights, strict=True)]
    order = sorted(range(len(candidates)), key=keys.__getitem__, reverse=True)
    return [candidates[index] for index in order[:count] if keys[index] >= 0]


def _replaced(tree: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, ast.expr | ast.stmt]]:
    """Yields pairs of a node and what it is replaced by."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, _NOT_ENTERED):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring
            continue
        yield from _changes(node)
        for name, value in ast.iter_fields(node):
            if name not in _NOT_ENTERED_FIELDS:
                waiting += [
                    child for child in (value if isinstance(value, list) else [value]) if isinstance(child, ast.AST)
                ]


def _changes(node: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, ast.expr | ast.stmt]]:
    match node:
        case ast.Compare(left=left, ops=[op], comparators=comparators) if type(op) in _COMPARED:
            yield node, ast.Compare(left, [_COMPARED[type(op)]()], comparators)
        case ast.BoolOp(op=op, values=values):
            yield node, ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield node, operand
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _COMPUTED and not (
            _is_text(left) or _is_text(right)
        ):
            yield node, ast.BinOp(left, _COMPUTED[type(op)](), right)
        case ast.Constant(value=bool(value)):
            yield node, ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            yield node, ast.Constant(value + 1)
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            if not isinstance(test, (ast.Constant, ast.Compare)) and not (
                isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
            ):
                yield test, ast.UnaryOp(ast.Not(), test)
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
            yield value, ast.Constant(None)
        case ast.AugAssign(target=target, op=op, value=value) if type(op) in _COMPUTED and not _is_text(value):
            yield node, ast.AugAssign(target, _COMPUTED[type(op)](), value)
        case ast.Expr(value=ast.Call()) | ast.Raise():
            yield node, ast.Pass()


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str | bytes))
