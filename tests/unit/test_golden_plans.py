"""Plans of well-known models on well-known machines: a change that moves them must say so.

`pytest tests/unit/test_golden_plans.py --update-golden` writes them anew; the diff shows what moved.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from packaging.version import Version
from tiers import tiered

from zeroinf.cli.main import cli

GOLDEN = Path(__file__).parents[1] / "golden"
PAIRS = [
    ("llama-2-70b", "1xRTX4090-24GB-64GiB"),
    ("bloom-176b", "8xA100-80GB-512GiB"),
    ("opt-30b", "1xA6000-48GB-252GiB"),
    ("llama-3-8b", "1xH200"),
    ("mixtral-8x7b", "1xA10-24GB"),
]
# What a model computes, and with what tensors, differs a little between versions of torch and transformers.
TOLERANCE, TOLERANCE_BYTES = 0.02, 32 << 20
# Facts and decisions: they do not differ.
EXACT = {
    "schema", "parameters", "weight_bytes", "blocks", "block_bytes", "kv_bytes_per_token", "context_limit",
    "free_bytes", "host_bytes", "disk_bytes", "prompt_tokens", "new_tokens", "world_size", "batch_size",
    "resident_blocks", "nvme_blocks", "host_rows", "available_bytes", "entering_rows",
}  # fmt: skip


def plan(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(cli, ["plan", *arguments, "--json", "--no-advice"], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def assert_same(found: Any, golden: Any, path: str) -> None:
    """Equal, but for sizes and rates that may differ by TOLERANCE; `path` leads to them in the document."""
    if isinstance(golden, dict):
        assert list(found) == list(golden), path
        for key in golden:
            assert_same(found[key], golden[key], f"{path}.{key}")
    elif isinstance(golden, list):
        assert len(found) == len(golden), path
        for index, pair in enumerate(zip(found, golden, strict=True)):
            assert_same(*pair, f"{path}[{index}]")
    elif isinstance(golden, int | float) and path.rpartition(".")[2] not in EXACT:
        assert found == pytest.approx(golden, rel=TOLERANCE, abs=TOLERANCE_BYTES if isinstance(golden, int) else 0), (
            path
        )
    elif path.rpartition(".")[2] != "reason":  # its figures stand in other places, too
        assert found == golden, path


# Where forwards take other memory, the planner may choose another batch.
@pytest.mark.skipif(Version(version("transformers")) < Version("5.24"), reason="plans were made with transformers 5.24")
@pytest.mark.parametrize(("model", "machine"), tiered(PAIRS, [pair for pair in PAIRS if pair[0] != "opt-30b"]))
def test_the_plan_is_the_one_that_was_agreed_on(model: str, machine: str, request: pytest.FixtureRequest) -> None:
    found = plan("--model", model, "--machine", machine)
    file = GOLDEN / f"{model}-on-{machine}.json"
    if request.config.getoption("--update-golden"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(found, indent=2) + "\n")
    assert_same(found, json.loads(file.read_text()), model)


def test_a_choice_or_a_size_that_moved_is_found() -> None:
    golden = json.loads((GOLDEN / "opt-30b-on-1xA6000-48GB-252GiB.json").read_text())
    needed = golden["plan"]["memory"]["gpu"]["needed_bytes"]
    for change in ({"offload": "nvme"}, {"batch_size": golden["plan"]["batch_size"] + 1}):
        with pytest.raises(AssertionError):
            assert_same({**golden, "plan": {**golden["plan"], **change}}, golden, "plan")
    moved = json.loads(json.dumps(golden).replace(str(needed), str(int(needed * 1.03))))
    with pytest.raises(AssertionError, match="needed_bytes"):
        assert_same(moved, golden, "plan")
