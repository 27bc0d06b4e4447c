"""All mutants of a file: one small change of one expression or statement each."""

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
CALLS = {"min": "max", "max": "min", "sum": "mean", "mean": "sum", "exp": "expm1", "all": "any", "any": "all"}


@dataclass(frozen=True)
class Mutant:
    """A piece of a file (byte offsets), and what stands in its place."""

    file: str
    line: int
    start: int
    end: int
    old: str
    new: str
    source: str
    """The line, without indentation: with `old` and `new` what identifies a mutant in the list of equivalents."""
    first: int
    last: int
    """The first and last line of the statement, without its body: a test that executes one of them may notice it."""

    @property
    def key(self) -> str:
        return f"{self.file} | {self.source} | {self.old} → {self.new}"


def _changed(node: ast.AST, **fields: object) -> ast.AST:
    made = copy.copy(node)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def _constants(node: ast.Constant) -> Iterator[ast.AST]:
    value = node.value
    if isinstance(value, bool):
        yield _changed(node, value=not value)
    elif isinstance(value, int):
        yield _changed(node, value=value + 1)
    elif isinstance(value, float):
        yield _changed(node, value=value * 2 if value else 1.0)


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in place of an expression."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in SWAPS:
            yield _changed(node, ops=[SWAPS[type(op)]()])
        case ast.BinOp(op=op, left=left) if type(op) in SWAPS and not isinstance(left, ast.Constant | ast.JoinedStr):
            yield _changed(node, op=SWAPS[type(op)]())
        case ast.BinOp(op=op, left=ast.Constant(value=int() | float())) if type(op) in SWAPS:
            yield _changed(node, op=SWAPS[type(op)]())
        case ast.BoolOp(op=op, values=[first, *_]):
            yield _changed(node, op=SWAPS[type(op)]())
            yield first
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            yield operand
        case ast.Constant():
            yield from _constants(node)
        case ast.Call(func=ast.Attribute(value=value, attr="detach"), args=[]):
            yield value
        case ast.Call(func=ast.Attribute(attr=name) as func) if name in CALLS:
            yield _changed(node, func=_changed(func, attr=CALLS[name]))
        case ast.Call(func=ast.Name(id=name) as func) if name in CALLS:
            yield _changed(node, func=_changed(func, id=CALLS[name]))
        case ast.IfExp(body=body, orelse=orelse):
            yield from (body, orelse)


def _skipped(node: ast.AST) -> bool:
    """Annotations are not looked into, nor messages of errors, nor assertions."""
    return isinstance(node, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom | ast.JoinedStr)


def _walk(node: ast.AST, statement: ast.stmt | None) -> Iterator[tuple[ast.AST, ast.stmt]]:
    """All nodes below a node, with the statement that each one belongs to."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _skipped(child):
                inner = child if isinstance(child, ast.stmt) else statement
                if inner is not None:
                    yield child, inner
                yield from _walk(child, inner)


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _replacements(tree: ast.Module) -> Iterator[tuple[ast.AST, str, ast.stmt]]:
    """Nodes, the source of what may stand in their place, and their statements."""
    for node, statement in _walk(tree, None):
        if isinstance(node, ast.expr):
            yield from ((node, f"({ast.unparse(each)})", statement) for each in variants(node))
        if isinstance(node, ast.If) and not _is_type_checking(node):
            yield from ((node.test, text, node) for text in ("True", "False"))
        if (isinstance(node, ast.Expr) and not _is_docstring(node)) or isinstance(node, ast.AugAssign):
            yield node, "pass", statement


def _lines(statement: ast.stmt) -> tuple[int, int]:
    """First and last line of a statement; of one with a body, those before its body."""
    body = getattr(statement, "body", None)
    last = statement.end_lineno or statement.lineno
    return statement.lineno, max(statement.lineno, body[0].lineno - 1) if body else last


def _is_type_checking(node: ast.If) -> bool:
    return "TYPE_CHECKING" in ast.unparse(node.test)


def _is_cached(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and any(ast.unparse(each) == "cache" for each in node.decorator_list)


def mutants_of(path: Path, name: str) -> list[Mutant]:
    """All mutants of a file, in its order."""
    raw = path.read_bytes()
    lines = raw.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    found = []
    tree = ast.parse(raw)
    cached = [(node.lineno, node.end_lineno or 0) for node in ast.walk(tree) if _is_cached(node)]
    for node, new, statement in _replacements(tree):
        start, end = (
            starts[row - 1] + column
            for row, column in ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))
        )
        source = lines[node.lineno - 1].decode().strip()
        place = _lines(statement)
        if any(row <= place[0] <= end_row for row, end_row in cached):
            place = (1, 1)  # only the first test that calls it executes its lines: every test may notice
        found.append(Mutant(name, node.lineno, start, end, raw[start:end].decode(), new, source, *place))
    return list(dict.fromkeys(found))
