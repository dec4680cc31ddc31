"""Two ranks that step together, one GPU each: one that runs out of memory before its forward stays in step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import changed, run_zeroinf
from small_models import make_checkpoint

pytestmark = pytest.mark.gpu

OUT_OF_MEMORY = """
import torch

make, calls = own.MicroBatch.inputs, []

def inputs(batch):
    calls.append(None)
    if len(calls) == 6:
        open(MARK, "w").close()
        raise torch.OutOfMemoryError("CUDA out of memory: not really")
    return make(batch)

if rank == "1":
    own.MicroBatch.inputs = inputs
"""


def completions(file: Path) -> dict[str, str]:
    return {line["id"]: line["completion"] for line in map(json.loads, file.read_text(encoding="utf-8").splitlines())}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")
def test_out_of_memory_while_inputs_are_made_costs_halves_of_micro_batches_and_no_token(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path / "llama")
    lines = [{"id": f"r{i}", "prompt": f"number {i} of several", "max_tokens": 8 + i % 5} for i in range(24)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = ["-m", str(folder), "-i", str(tmp_path / "in.jsonl"), "--dtype", "float32", "-b", "4", "--ignore-eos"]
    common += ["--engine", "stream", "--offload", "cpu", "--resident-blocks", "0"]
    alone, ranks = tmp_path / "alone.jsonl", tmp_path / "ranks.jsonl"
    done = run_zeroinf([*common, "-o", str(alone)])
    assert done.code == 0, done.err
    mark = tmp_path / "ran-out"
    env = changed(tmp_path, {"zeroinf.generation.micro_batch": f"MARK = {str(mark)!r}{OUT_OF_MEMORY}"})
    more = ["-o", str(ranks), "--fetch", "partitioned"]
    done = run_zeroinf([*common, *more], ranks=2, launcher="num-gpus", env=env, timeout=150)
    assert done.code == 0, done.err
    assert mark.exists()
    assert completions(ranks) == completions(alone)
    assert len(completions(ranks)) == len(lines)
