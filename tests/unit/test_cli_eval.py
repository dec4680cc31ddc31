"""`zeroinf eval`: every token is predicted once, and figures are those of plain transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer
from wire_reference import save_through_codes

from zeroinf.cli.main import cli
from zeroinf.errors import DoesNotFitError, InputError, UsageError
from zeroinf.options import planning
from zeroinf.planner import pass_shapes
from zeroinf.runs import session
from zeroinf.runs.evaluate import cut

TEXT = "The quick brown fox jumps over the lazy dog, and not for the first time. "


def evaluated(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(cli, ["eval", *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@given(st.integers(2, 90), st.lists(st.just(-1), max_size=2), st.integers(4, 40))
def test_windows_predict_each_token_once_after_something(count: int, lead: list[int], window: int) -> None:
    tokens = list(range(count))
    parts = list(cut(tokens, lead, window))
    begin = max(1, len(lead))
    assert [token for part in parts for token in part[begin:]] == tokens[0 if lead else 1 :]
    assert all(part[:begin] == (lead or [part[begin] - 1]) for part in parts)
    assert all(begin < len(part) <= window for part in parts)


def test_a_window_too_short_for_what_begins_it_is_refused() -> None:
    with pytest.raises(UsageError, match="--window 2 leaves no token"):
        list(cut([1, 2, 3], [7, 8], 2))


@pytest.mark.parametrize("wire", ["model", "int4"])
def test_figures_are_those_of_plain_transformers(
    wire: Any, small_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 3)
    folder = small_checkpoint("llama")
    found = evaluated("--model", str(folder), "--text", str(text), "--window", "50", "--wire", wire)
    plain = folder if wire == "model" else save_through_codes(folder, wire, tmp_path / "coded")
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder)(text.read_text())["input_ids"]
    nats = tokens = 0.0
    for start in range(1, len(ids), 49):
        window = torch.tensor([ids[start - 1 : start + 49]])
        part = window.shape[1] - 1
        nats += model(window, labels=window).loss.item() * part
        tokens += part
    assert (found["tokens"], found["wire"]) == (tokens, wire)
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(TEXT * 3), rel=1e-4)


def test_a_window_whose_scores_do_not_fit_is_refused_with_one_whose_scores_do(
    small_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    given = ["--model", str(small_checkpoint("llama")), "--text", str(tmp_path / "text.txt"), "--dtype", "float32"]
    with pytest.raises(DoesNotFitError, match=r"scores of a window of 60 tokens.* 60\.0 KiB of host memory") as caught:
        evaluated(*given, "--window", "60", "--host-memory", "60KiB")
    assert "--window 4 takes 18.0 KiB" in (caught.value.hint or "")


def test_a_plan_counts_a_window_in_one_part_where_prompts_of_a_run_would_be_parted(
    small_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = []

    def note(*arguments: Any) -> Any:
        plans.append(planning.plan_run(*arguments)[0])
        return plans[-1], None, None

    monkeypatch.setattr(pass_shapes, "_PREFILL_TOKENS", (8, 8))
    monkeypatch.setattr(session, "plan_run", note)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    evaluated("--model", str(small_checkpoint("llama")), "--text", str(text), "--window", "50")
    assert plans[0].prefill_tokens >= 50


@pytest.mark.parametrize(
    ("content", "arguments", "error"),
    [
        (b"\xff\xfe\xff", (), InputError),
        (b"", (), InputError),
        (b"words and words", ("--window", "1000"), UsageError),
        (b"words and words", ("--offload", "cpu", "--nvme-path", "/"), UsageError),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    content: bytes, arguments: tuple[str, ...], error: type[Exception], small_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    result = CliRunner().invoke(
        cli, ["eval", "--model", str(small_checkpoint("llama")), "--text", str(text), *arguments]
    )
    assert isinstance(result.exception, error), result.output
