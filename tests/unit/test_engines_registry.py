"""An engine is known by its descriptor: nothing outside its folder and the registry compares engines' names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import zeroinf
from zeroinf.engines.registry import ENGINES, default_engine, descriptor_of, engines

NAMES = {engine.name for engine in ENGINES}
# Keys of a request's body in OpenAI's format, which has a "stream" of its own.
NOT_ENGINES = {"jobs/foreign.py"}


@pytest.mark.parametrize("folder", ["planner", "jobs", "options", "runs", "simulation"])
def test_no_engine_is_named_where_all_are_treated_alike(folder: str) -> None:
    root = Path(zeroinf.__file__).parent
    named = [
        f"{file.relative_to(root)}:{node.lineno}"
        for file in sorted((root / folder).rglob("*.py"))
        if str(file.relative_to(root)) not in NOT_ENGINES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and node.value in NAMES
    ]
    assert named == []


def test_the_registry_hands_in_all_engines_the_default_first() -> None:
    assert engines() == ENGINES
    assert default_engine() == ENGINES[0].name
    assert all(descriptor_of(engine.name) is engine for engine in ENGINES)


def test_descriptors_load_no_library_of_an_engine() -> None:
    check = (
        "import sys, zeroinf.engines.registry; "
        "print(sorted({'torch', 'transformers', 'deepspeed', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
