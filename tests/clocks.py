"""Find assertions on elapsed time: `python tests/clocks.py` (part of `make check`) prints them and exits with 1.

A test that compares a clock with a bound fails on a busy machine. Tests count steps, events, calls and bytes, and wait
for states by `eventually` (processes.py); speed is measured by `make bench-…`. Where a time is the promise itself, the
assertion's first line says why: `# clock: REASON`.

The check reads the syntax tree of each file. A value comes from a clock if it is a call in CLOCKS, an attribute
`elapsed`, a name that the same function assigns such a value to, the result of a function of the same file that returns
one, or computed from these. An assertion that orders such a value (<, <=, >, >=, approx) is a finding.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

TESTS = Path(__file__).parent
# Called without arguments: time.time(), loop.time(), perf_counter(), …
CLOCKS = {
    "time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "process_time",
    "process_time_ns", "thread_time", "thread_time_ns", "total_seconds",
}  # fmt: skip
# Functions whose result is a time if their argument is one.
PASSING = {
    "abs", "approx", "ceil", "float", "floor", "int", "list", "max", "mean", "median", "min", "round", "sorted", "sum",
}  # fmt: skip
ADDING = {"append", "add", "extend"}
MARK = "# clock: "
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Clocks:
    """The clock values of one function; `functions`: names of functions of this file that return some."""

    def __init__(self, scope: Function, functions: set[str]) -> None:
        self.functions = functions
        self.names: set[str] = set()
        before = -1
        while before < len(self.names):
            before = len(self.names)
            for node in ast.walk(scope):
                self._learn(node)

    def holds(self, node: ast.AST | None) -> bool:
        """Whether the expression's value comes from a clock."""
        match node:
            case ast.Call():
                name = _name(node.func)
                if (name in CLOCKS and not node.args) or name in self.functions:
                    return True
                return name in PASSING and any(map(self.holds, node.args))
            case ast.Name() | ast.Attribute():
                return _label(node) in self.names or (isinstance(node, ast.Attribute) and node.attr == "elapsed")
            case ast.Subscript() | ast.Starred() | ast.Await():
                return self.holds(node.value)
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp():
                return self.holds(node.elt)
            case ast.BinOp() | ast.UnaryOp() | ast.IfExp() | ast.BoolOp() | ast.Tuple() | ast.List() | ast.Set():
                return any(map(self.holds, ast.iter_child_nodes(node)))
        return False

    def _learn(self, node: ast.AST) -> None:
        match node:
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
                for name, value in zip(names, values, strict=False):
                    if self.holds(value):
                        self._take(name)
            case ast.Assign() if self.holds(node.value):
                for target in node.targets:
                    self._take(target)
            case ast.AnnAssign() | ast.AugAssign() | ast.NamedExpr() if self.holds(node.value):
                self._take(node.target)
            case ast.Call(func=ast.Attribute(attr=attr, value=kept)) if attr in ADDING:
                if any(map(self.holds, node.args)):  # took.append(perf_counter() - began)
                    self._take(kept)
            case ast.For() | ast.comprehension() if self.holds(node.iter):
                self._take(node.target)

    def _take(self, target: ast.expr) -> None:
        for part in target.elts if isinstance(target, ast.Tuple) else [target]:
            if label := _label(part):
                self.names.add(label)

    def ordered(self, check: ast.Assert) -> bool:
        """Whether the assertion orders a clock's value against something."""
        for node in ast.walk(check.test):
            if isinstance(node, ast.Compare) and any(map(self.holds, [node.left, *node.comparators])):
                approximate = any(_name(part.func) == "approx" for part in ast.walk(node) if isinstance(part, ast.Call))
                if approximate or any(isinstance(op, ast.Lt | ast.LtE | ast.Gt | ast.GtE) for op in node.ops):
                    return True
        return False


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _label(node: ast.expr) -> str:
    """`began`, `self.left`; of anything else nothing."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = _label(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return _label(node.value) if isinstance(node, ast.Subscript | ast.Starred) else ""


def examine(path: Path) -> list[str]:
    """`FILE:LINE: TEXT` of each assertion on a clock in one file."""
    lines = path.read_text("utf-8").splitlines()
    scopes = [node for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, Function)]
    # 1. The functions that return a clock's value, until no more are found.
    functions: set[str] = set()
    before = -1
    while before < len(functions):
        before = len(functions)
        for scope in scopes:
            clocks = Clocks(scope, functions)
            inner = {part for one in ast.walk(scope) if one is not scope and isinstance(one, Function)
                     for part in ast.walk(one)}  # fmt: skip
            returned = [one for one in ast.walk(scope) if isinstance(one, ast.Return) and one not in inner]
            if any(clocks.holds(one.value) for one in returned):
                functions.add(scope.name)
    # 2. The assertions.
    found = {
        check.lineno
        for scope in scopes
        for clocks in [Clocks(scope, functions)]
        for check in ast.walk(scope)
        if isinstance(check, ast.Assert) and MARK not in lines[check.lineno - 1] and clocks.ordered(check)
    }
    return [f"{path}:{line}: {lines[line - 1].strip()}" for line in sorted(found)]


def main(folder: Path = TESTS) -> int:
    found = [line for path in sorted(folder.rglob("*.py")) for line in examine(path)]
    for line in found:
        print(line)  # noqa: T201 - the command's output
    if found:
        print("tests: count events instead, wait by `eventually`, or give a reason (# clock: REASON)")  # noqa: T201
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
