"""One set of figures: plan, progress, report, its JSON and `zeroinf status` say the same of a run."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from zeroinf.cli.console import ConsoleObserver
from zeroinf.cli.main import cli, main
from zeroinf.service.observer import Progress

ROWS, TOKENS = 12, 20


@pytest.fixture
def model(small_checkpoint: Callable[[str], Path]) -> str:
    return str(small_checkpoint("llama"))


def found(pattern: str, text: str) -> str:
    """The one place in `text` where `pattern` is."""
    (value,) = re.findall(pattern, text, flags=re.MULTILINE)
    return str(value)


def test_plan_progress_report_json_and_status_of_a_run_agree(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[Progress] = []
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.setattr(ConsoleObserver, "progress", lambda self, progress: told.append(progress))
    monkeypatch.setattr("zeroinf.runs.request_feed._TELL_EVERY_S", 0.0)
    out, file = tmp_path / "out.jsonl", tmp_path / "report.json"
    prompts = [word for row in range(ROWS) for word in ("--prompt", f"prompt {row}")]
    job = ["-m", model, *prompts, "--max-new-tokens", str(TOKENS), "--ignore-eos", "--offload", "cpu"]
    monkeypatch.setattr("sys.argv", ["zeroinf", "run", *job, "-o", str(out), "--report", str(file)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    shown = capfd.readouterr().err
    report = json.loads(file.read_text())
    compared = {one["name"]: one for one in report["compared"]}

    # Memory and speed that were expected.
    assert found(r"takes (.* GiB) of host memory$", shown) == found(r"^host memory in all  (.*? GiB)", shown)
    assert f"{compared['speed']['predicted']:,.1f} tokens/s expected" in shown
    # What happened.
    status = json.loads(CliRunner().invoke(cli, ["status", str(out), "--json"]).stdout)
    rate = report["tokens_per_second"]
    assert (told[-1].tokens_per_second, status["tokens_per_second"]) == (rate, rate)
    assert compared["speed"]["measured"] == rate
    assert f"{rate:,.1f} tokens/s" in found(r"^generate (.*)$", shown)
    assert f"{ROWS * TOKENS:,} tokens, {rate:,.1f} tokens/s" in CliRunner().invoke(cli, ["status", str(out)]).stdout
    assert (told[-1].tokens, status["tokens"], report["completion_tokens"]) == (ROWS * TOKENS,) * 3
    # From the first pass on, what is left is known.
    first = told[0]
    assert (first.rows_done, first.tokens + first.tokens_left) == (0, ROWS * TOKENS)
    assert first.expected_s == pytest.approx(ROWS * TOKENS / compared["speed"]["predicted"])
    assert first.left_s is not None
    assert first.left_s > 0
    assert told[-1].left_s == 0


def test_the_speed_that_eval_expects_counts_the_tokens_that_it_predicts(model: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one word after the other " * 40)
    done = CliRunner().invoke(cli, ["eval", "-m", model, "--text", str(text), "--window", "64"])
    assert done.exit_code == 0, done.output
    expected, a_pass = re.findall(r"([\d,.]+) tokens/s expected: .* pass ([\d.]+) s", done.stderr)[0]
    assert "decode step" not in done.stderr
    whole = CliRunner().invoke(cli, ["eval", "-m", model, "--text", str(text), "--window", "64", "--json"])
    found_json = json.loads(whole.stdout)
    assert found_json["tokens_per_second"] == found_json["tokens"] / found_json["evaluate_s"]
    # 64 tokens cannot be predicted in a pass at a rate of one a pass.
    assert float(expected.replace(",", "")) > 10 / max(float(a_pass), 0.01)
    assert "speed  " in done.stdout
