"""The reference of the command line says what the commands say of themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make-cli-reference"
RENDER = "import runpy, sys; sys.stdout.write(runpy.run_path(sys.argv[1])['render']())"


def test_the_reference_of_the_command_line_is_fresh() -> None:
    """In a process of its own: what other tests have imported or set changes no help."""
    made = subprocess.run(
        [sys.executable, "-c", RENDER, str(SCRIPT)], capture_output=True, text=True, check=True
    ).stdout
    page = SCRIPT.parents[1] / "docs" / "reference" / "cli.md"
    assert page.read_text(encoding="utf-8") == made, "run scripts/make-cli-reference"
