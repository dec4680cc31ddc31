"""Memory of a real GPU goes by the plan: no more than predicted, and never above what the user allowed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from launching import run_zeroinf, write_jsonl
from small_models import small_config

from zeroinf.model.inspect import read_anatomy
from zeroinf.planner.plan import Plan
from zeroinf.service.gpu_memory import GpuMemory

pytestmark = pytest.mark.gpu

GIB = 1 << 30


@pytest.fixture
def device() -> Iterator[torch.device]:
    """A GPU of which this process holds nothing, and may take all again when the test is over."""
    found = torch.device("cuda", 0)
    torch.cuda.empty_cache()
    yield found
    torch.cuda.set_per_process_memory_fraction(1.0, found)


def test_more_than_the_limit_cannot_be_allocated(device: torch.device) -> None:
    plan = Plan(
        anatomy=read_anatomy(small_config("llama")),
        engine="stream",
        offload="none",
        dtype="bfloat16",
        device="cuda",
        world_size=1,
        batch_size=1,
    )
    GpuMemory(plan, device, 2 * GIB).check()
    held = torch.empty(GIB, dtype=torch.uint8, device=device)
    segments = torch.cuda.memory._snapshot()["segments"]
    inside = [s for s in segments if 0 <= held.data_ptr() - s["address"] < s["total_size"]]
    assert [segment["is_expandable"] for segment in inside] == [True]
    del held
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2 * GIB + 1, dtype=torch.uint8, device=device)


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_a_run_takes_no_more_than_its_plan_said(offload: str, tmp_path: Path) -> None:
    prompts = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "x" * (40 + i), "ignore_eos": True} for i in range(64)])
    arguments = ["-m", "pythia-160m", "--random-weights", "-i", str(prompts), "-o", str(tmp_path / "out.jsonl")]
    limits = ["--offload", offload, "--gpu-memory", "8GiB", "--max-new-tokens", "16"]
    done = run_zeroinf([*arguments, *limits, "--report", str(tmp_path / "report.json")])
    assert done.code == 0, done.err
    assert "out of GPU memory" not in done.err
    report = json.loads((tmp_path / "report.json").read_text())
    compared = {one["name"]: one for one in report["compared"]}
    assert {"weights that stay", "KV cache", "activations, workspaces"} <= compared.keys()
    for name in ("allocated", "reserved"):
        assert 0 < compared[name]["measured"] <= compared[name]["predicted"] <= 8 * GIB
