"""What `scripts/setup` and `scripts/test` are made of."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
PASSES_THE_SECOND_TIME = """
from pathlib import Path

def test_{name}():
    before = Path(__file__).with_name("{name}")
    assert before.exists() or before.touch()
"""


def pytest_again(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPTS / "pytest-again", "-n", "1"]
    environment = {
        **os.environ,
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": "-p xdist.plugin -p no:cacheprovider",
    }
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize(
    ("passing_later", "failing", "code", "runs"),
    [(3, False, 0, 2), (1, True, 1, 2), (4, False, 1, 1), (0, False, 0, 1)],
)
def test_few_tests_that_fail_run_again_alone_and_are_named(
    tmp_path: Path, passing_later: int, failing: bool, code: int, runs: int
) -> None:
    tests = [PASSES_THE_SECOND_TIME.format(name=f"flaky_{number}") for number in range(passing_later)]
    tests += ["\ndef test_good():\n    pass\n", "\ndef test_bad():\n    assert False\n" if failing else ""]
    (tmp_path / "test_it.py").write_text("".join(tests))
    done = pytest_again(tmp_path)
    assert (done.returncode, done.stdout.count("test session starts")) == (code, runs), done.stdout + done.stderr
    named = done.stdout.partition("FLAKY: ")[2]
    flaky = (
        {f"test_it.py::test_flaky_{number}" for number in range(passing_later)} if runs == 2 and code == 0 else set()
    )
    assert set(named.strip().rpartition("mending: ")[2].split(", ")) - {""} == flaky


def test_every_script_is_described_and_each_of_python_is_linted_and_type_checked() -> None:
    scripts = [file for file in SCRIPTS.iterdir() if file.is_file() and file.name != "README.md"]
    described = (SCRIPTS / "README.md").read_text(encoding="utf-8")
    assert [file.name for file in scripts if not re.search(rf"`{re.escape(file.name)}[ `]", described)] == []
    tools = tomllib.loads((SCRIPTS.parent / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    programs = {f"scripts/{file.name}" for file in scripts if file.read_bytes().startswith(b"#!/usr/bin/env python3")}
    assert programs - set(tools["ruff"]["extend-include"]) == set()
    assert programs - set(tools["mypy"]["files"]) == set()


def test_pips_settings_are_handed_to_uv_or_refused() -> None:
    arguments = runpy.run_path(str(SCRIPTS / "uv_settings.py"))["uv_arguments"]
    listed = (
        "global.index-url='https://one/simple'\nglobal.find-links='/a /b'\nglobal.timeout='60'\n"
        "install.index-url='https://two/simple'\n:env:.constraint='c.txt'\ndownload.dest='/c'\n"
    )
    given = [
        "--default-index",
        "https://two/simple",
        "--find-links",
        "/a",
        "--find-links",
        "/b",
        "--constraint",
        "c.txt",
    ]
    assert arguments(listed) == [*given, "--index-strategy", "unsafe-best-match"]
    with pytest.raises(ValueError, match="uv does not know: no-binary"):
        arguments("install.no-binary=':all:'\n")
