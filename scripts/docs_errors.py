"""Hook of MkDocs: puts a table of every error that zeroinf raises where a page says `<!-- errors -->`.

Messages and hints are read from the source when the site is built, with `…` for what differs; nothing is imported.
Messages that are made elsewhere, as a library's own words, are not in it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_MARK = "<!-- errors -->"
_SOURCE = Path(__file__).resolve().parents[1] / "zeroinf"
_KINDS = {
    "HintedError": 2,
    "UsageError": 2,
    "ModelError": 2,
    "InputError": 2,
    "OutputError": 2,
    "DoesNotFitError": 3,
    "EnvironmentProblem": 4,
    "ZeroinfError": 1,
    "StoreError": 1,
    "RankError": 1,
    "ClusterError": 1,
}
"""Classes of errors with the exit code of a command that ends with one."""


class RaisedError(NamedTuple):
    """An error of the source: its exit code, and its words with `…` for what differs."""

    code: int
    message: str
    hint: str


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs with the text of each page."""
    return markdown.replace(_MARK, _table()) if _MARK in markdown else markdown


def errors_of(source: str) -> Iterator[RaisedError]:
    """Every error that a module makes with words of its own."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id not in _KINDS:
            continue
        second = node.args[1] if node.func.id == "HintedError" and len(node.args) > 1 else None
        hint = next((one.value for one in node.keywords if one.arg == "hint"), second)
        message = _words(node.args[0]) if node.args else ""
        if message.replace("…", "").strip(" :,()"):
            yield RaisedError(_KINDS[node.func.id], message, _words(hint))


def _words(node: ast.expr | None) -> str:
    """The text of an expression; of two ways the first."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_words(one) if isinstance(one, ast.Constant) else "…" for one in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _words(node.left) + _words(node.right)
    if isinstance(node, ast.IfExp | ast.BoolOp):
        return _words(node.body if isinstance(node, ast.IfExp) else node.values[0])
    return "" if node is None else "…"


def _table() -> str:
    modules = (file.read_text(encoding="utf-8") for file in sorted(_SOURCE.rglob("*.py")))
    found = {one for module in modules for one in errors_of(module)}
    lines = ["| `error:` | `hint:` | exit code |", "|---|---|---|"]
    for one in sorted(found, key=lambda one: (one.message.startswith("…"), one.message.lstrip("…-' ").lower(), one)):
        hint = one.hint if one.hint.strip("…") else ""
        lines.append(f"| {_cell(one.message)} | {_cell(hint)} | {one.code} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    plain = " ".join(text.split())
    for mark in "\\|<*_`[":
        plain = plain.replace(mark, f"&#{ord(mark)};")
    return plain
