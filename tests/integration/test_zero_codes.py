"""DeepSpeed's own codes of weights, asked for in a JSON of the user's."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import log
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from launching import run_zeroinf

from zeroinf.cli.main import cli
from zeroinf.engines.zero.codes import with_codes
from zeroinf.model.inspect import build_meta, read_anatomy
from zeroinf.model.resolve import resolve_model

CODES = {"num_bits": 4, "group_size": 16, "group_dim": 1, "symmetric": False}


def configured(model: Path | str, dtype: str, codes: dict[str, Any], to: Path) -> list[str]:
    """A run with DeepSpeed's JSON for the model, and `codes` in it."""
    how = ["-m", str(model), "--dtype", dtype]
    config = json.loads(CliRunner().invoke(cli, ["config", *how, "--offload", "cpu"], catch_exceptions=False).stdout)
    to.write_text(json.dumps({**config, "weight_quantization": {"quantized_initialization": codes}}), encoding="utf-8")
    return [*how, "--zero-config", str(to), "-b", "1", "--prompt", "Hello", "--max-new-tokens", "4"]


def test_weights_cross_as_codes_and_the_report_says_that_they_lose(
    small_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    reports: list[dict[str, Any]] = []
    model = small_checkpoint("llama")
    config = resolve_model(str(model)).config
    whole = read_anatomy(config, dtype="float32")
    report = tmp_path / "report.json"
    for codes in ({}, CODES):
        how = configured(model, "float32", codes, tmp_path / "zero.json")
        done = run_zeroinf([*how, "--report", str(report)])
        assert done.code == 0, done.err
        reports.append(json.loads(report.read_text()))
    plain, coded = reports
    assert (plain["wire"], coded["wire"]) == ("model", "int4")
    for one, anatomy in ((plain, whole), (coded, with_codes(whole, build_meta(config, "float32"), CODES))):
        matrices = {tensor.name for tensor in whole.tensors() if len(tensor.shape) == 2 and not tensor.is_buffer}
        passing = sum(tensor.nbytes for tensor in anatomy.tensors() if tensor.name in matrices)
        assert one["streamed_bytes"] == passing * one["ranks"][0]["passes"]
    assert "weights int4" in done.out + done.err


@pytest.mark.full
def test_weights_that_fit_as_codes_only_are_planned_as_codes(tmp_path: Path) -> None:
    for codes, code in (({}, 3), (CODES, 0)):
        how = configured("pythia-160m", "float32", codes, tmp_path / "zero.json")
        done = run_zeroinf([*how, "--random-weights", "--host-memory", "2.8GiB"])
        assert done.code == code, done.err


@pytest.mark.full
def test_random_weights_are_drawn_before_they_become_codes(tmp_path: Path) -> None:
    """The likeliest token of such small weights is hardly likelier than others; of codes overwritten, it is."""
    out = tmp_path / "out.jsonl"
    how = configured("pythia-70m", "float32", CODES, tmp_path / "zero.json")
    done = run_zeroinf([*how, "--random-weights", "--ignore-eos", "--logprobs", "0", "-o", str(out)])
    assert done.code == 0, done.err
    tokens = json.loads(out.read_text())["logprobs"]
    assert len(tokens) == 4 and all(log(1 / 50304) < token["logprob"] < log(1 / 50304) + 4 for token in tokens)


def test_a_checkpoint_of_another_dtype_is_refused(small_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    done = run_zeroinf(configured(small_checkpoint("llama"), "bfloat16", CODES, tmp_path / "zero.json"))
    assert done.code == 2
    assert "as they are stored, here float32, and the model runs in bfloat16" in done.err
