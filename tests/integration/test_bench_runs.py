"""`zeroinf bench` as a user runs it: real cells, one of which must fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from zeroinf.bench import runner
from zeroinf.cli.main import cli


def test_a_matrix_goes_on_past_a_cell_that_fails_and_a_second_call_runs_nothing(
    small_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, model = tmp_path / "bench.json", str(small_checkpoint("llama"))
    words = ["bench", "--engines", "stream", "-m", model, "-b", "2", "--output-len", "4", "-r", "2"]
    words += ["--input-len", "300,8", "-o", str(out)]
    first = CliRunner().invoke(cli, words, standalone_mode=False)
    failed, found = json.loads(out.read_text())["cells"]
    assert failed["status"] == "failed"
    assert "context" in failed["message"]
    assert found["status"] == "ok", found["message"]
    assert found["report"]["completion_tokens"] == 2 * 4
    assert 7 <= found["report"]["prompt_tokens"] / 2 <= 8
    assert len(found["figures"]["tokens_per_second"]["samples"]) == 2
    assert found["figures"]["first_token_s"]["mean"] > 0
    assert "failed" in first.stdout

    monkeypatch.setattr(runner, "run_cell", lambda *args: pytest.fail("it ran again"))
    assert CliRunner().invoke(cli, words, standalone_mode=False).stdout == first.stdout
