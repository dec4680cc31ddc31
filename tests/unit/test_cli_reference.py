"""docs/reference/cli.md is what scripts/make-cli-reference makes of the commands as they are now."""

from __future__ import annotations

from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "make-cli-reference"


def test_the_reference_of_the_command_line_is_fresh() -> None:
    spec = spec_from_loader("make_cli_reference", SourceFileLoader("make_cli_reference", str(SCRIPT)))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.REFERENCE.read_text() == module.render(), "run scripts/make-cli-reference"
    assert "## `zeroinf store verify`" in module.render()
