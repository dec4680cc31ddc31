"""Keys and values that cross a real link: the tokens are those of rows whose cache never left the GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from generating import rows_of, run_rows
from launching import run_zeroinf, write_jsonl
from small_models import VOCABULARY, make_checkpoint

from zeroinf.distributed.control import Control
from zeroinf.distributed.world import World
from zeroinf.engines.stream.engine import StreamEngine
from zeroinf.model.inspect import read_anatomy
from zeroinf.model.resolve import resolve_model
from zeroinf.planner.plan import Plan

pytestmark = pytest.mark.gpu

PAGED = {"rows": 12, "micro_batch_rows": 3, "prefill_tokens": 64}
PLACES: dict[str, dict[str, Any]] = {
    "all": {"pages": 0, "host_tokens": 12 * 180},
    "mixed": {"pages": 60, "host_tokens": 7 * 180},
}


PACKED = {"forward_tokens": 50}


def tokens_of(folder: Path, streams: bool, **limits: Any) -> list[list[int]]:
    """Forty rows of many lengths that come and go, with weights that stream or stay."""
    source = resolve_model(str(folder))
    anatomy = read_anatomy(source.config, dtype="float32")
    plan = Plan(
        anatomy=anatomy,
        engine="stream",
        offload="cpu" if streams else "none",
        resident_blocks=0 if streams else len(anatomy.blocks),
        dtype="float32",
        device="cuda",
        world_size=1,
        batch_size=12,
    )
    engine = StreamEngine(plan, source, Control(World(), "cuda"), torch.device("cuda", 0))
    prompts = [[3 + (7 * row + 11 * at) % (VOCABULARY - 3) for at in range(1 + 37 * row % 120)] for row in range(40)]
    rows = rows_of(prompts, [1 + 13 * row % 50 for row in range(40)], ignore_eos=True)
    try:
        run_rows(engine, rows, draw=5, **PAGED, **limits)
    finally:
        engine.close()
    return [row.generated for row in rows]


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mixtral"])
def test_packed_rows_give_the_same_tokens(name: str, tmp_path: Path) -> None:
    folder = make_checkpoint(name, tmp_path / name)
    expected = tokens_of(folder, True)
    for limits in PLACES.values():
        assert tokens_of(folder, True, **PACKED, **limits) == expected


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("place", sorted(PLACES))
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "gpt_oss", "mixtral"])
def test_the_cpu_attends_to_the_same_effect(name: str, place: str, streams: bool, tmp_path: Path) -> None:
    folder = make_checkpoint(name, tmp_path / name)
    by_cpu = {**PACKED, **PLACES[place], "cpu_rows": 12}
    assert tokens_of(folder, streams, **by_cpu) == tokens_of(folder, streams)


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("place", sorted(PLACES))
@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v3", "mixtral"])
def test_tokens_are_those_of_a_cache_on_the_gpu(name: str, place: str, streams: bool, tmp_path: Path) -> None:
    folder = make_checkpoint(name, tmp_path / name)
    assert tokens_of(folder, streams, **PLACES[place]) == tokens_of(folder, streams)


def test_codes_give_the_same_tokens_however_prompts_are_cut(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path / "llama")
    limits = {**PLACES["all"], "kv_dtype": "int8"}
    expected = tokens_of(folder, False, **limits)
    assert tokens_of(folder, True, **limits) == expected
    assert tokens_of(folder, True, **PACKED, **limits) == expected


@pytest.mark.parametrize("attention", ["gpu", "cpu"])
def test_a_run_takes_the_memory_that_its_plan_said(attention: str, tmp_path: Path) -> None:
    prompts = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "x" * (200 + i), "ignore_eos": True} for i in range(96)])
    arguments = ["-m", "pythia-160m", "--random-weights", "-i", str(prompts), "-o", str(tmp_path / "out.jsonl")]
    limits = ["--offload", "cpu", "--kv", "host", "--gpu-memory", "8GiB", "--max-new-tokens", "32"]
    limits += ["--kv-attention", attention]
    done = run_zeroinf([*arguments, *limits, "--report", str(tmp_path / "report.json")])
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "report.json").read_text())
    compared = {one["name"]: one for one in report["compared"]}
    assert report["host_rows"] == report["batch_size"]
    assert report["kv_attention"] == attention
    assert attention == "cpu" or report["kv_gbps"] > 0
    for name in ("KV cache", "host memory, page-locked"):
        assert compared[name]["measured"] == pytest.approx(compared[name]["predicted"], rel=0.01)
    assert compared["allocated"]["measured"] <= compared["allocated"]["predicted"]
