"""Hook of MkDocs: puts a table of a class's fields where a page says `<!-- fields: zeroinf.module.Class -->`.

Types and meanings are read from the source by griffe when the site is built; nothing is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

_MARK = re.compile(r"^<!-- fields: ([\w.]+)\.(\w+) -->$", re.MULTILINE)
_ANNOTATED = re.compile(r"Annotated\[((?:[^][,]|\[[^]]*\])+),.*\]")
_NAMES = {"_Id": "str", "_Text": "str", "_Message": "message", "str | None": "str"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs with the text of each page."""
    return _MARK.sub(lambda found: _table(found[1], found[2]), markdown)


def _table(module: str, name: str) -> str:
    found = griffe.load(module, search_paths=["."], allow_inspection=False)[name]
    lines = ["| key | type | |", "|---|---|---|"]
    for field in _fields(found):
        meaning = " ".join((field.docstring.value if field.docstring else "").split()).replace("|", "\\|")
        lines.append(f"| `{field.name}` | `{_type(str(field.annotation))}` | {meaning} |")
    return "\n".join(lines).replace("` |", "` |")


def _fields(found: Any) -> Iterator[Any]:
    """Annotated attributes, those of base classes of the same module first."""
    for base in found.bases:
        parent = found.module.members.get(str(base))
        if parent is not None and not parent.is_alias:
            yield from _fields(parent)
    for member in found.members.values():
        if member.is_attribute and member.annotation is not None and not member.name.startswith("_"):
            yield member


def _type(annotation: str) -> str:
    """The type without what checks it, in the words of JSON's readers."""
    plain = _ANNOTATED.sub(r"\1", annotation)
    for name, meant in _NAMES.items():
        plain = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", meant, plain)
    return plain.removesuffix(" | None").replace(" | ", " or ")
