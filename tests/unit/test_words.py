"""Names and docstrings are plain: the field's terms, one meaning a name, full sentences."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "zeroinf"
MODULES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))
RIDDLES = re.compile(r"(What|Who|Whoever|Those|These|That|Where|Which|How|Such|Of|From|On|One|As|Not)\b")
# Pictures, and what says the same in the field's terms (docs/glossary.md).
BANNED = {
    "Desk": "BatchState",
    "Leaving": "Shutdown",
    "because_of": "on_error",
    "with_the_dead": "on_peer_death",
    "give_way": "defer_to_peer_failure",
    "confess": "publish_exit_reason",
    "carry": "transfer",
    "Wish": "Constraints",
    "wish": "constraints",
    "Carrier": "WeightTransfer",
    "Arena": "RangeAllocator",
}


@cache
def parsed(module: str) -> ast.Module:
    return ast.parse((PACKAGE / module).read_text())


@pytest.mark.parametrize("module", MODULES)
def test_a_module_says_what_it_does_in_full_sentences(module: str) -> None:
    docstring = ast.get_docstring(parsed(module))
    assert docstring, "a module says what it does, what goes in and what comes out"
    assert not RIDDLES.match(docstring), f"begin with a subject: {docstring.partition(chr(10))[0]}"
    assert docstring.partition("\n")[0][0] not in " \n"
    assert docstring.rstrip()[-1] in '.)`}"', "a sentence ends"


def test_public_classes_have_one_meaning_each() -> None:
    homes = defaultdict(set)
    for module in MODULES:
        for node in parsed(module).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].add(module)
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


def test_names_are_the_fields_terms() -> None:
    found = {
        (module, name)
        for module in MODULES
        for node in ast.walk(parsed(module))
        for name in (getattr(node, "name", None), getattr(node, "arg", None), getattr(node, "attr", None))
        if isinstance(name, str) and name.lstrip("_") in BANNED
    }
    assert not found, {f"{module}: {name}": BANNED[name.lstrip("_")] for module, name in found}
