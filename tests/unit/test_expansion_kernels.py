"""The GPU's expansion of every form of codes, interpreted on the CPU: `TRITON_INTERPRET=1`, and Triton."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zeroinf.model.quantized import bnb, fp4, fp8, ggml, gptq, hqq, integers, torchao  # noqa: F401  have operators
from zeroinf.model.quantized.fused import EXAMPLES

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench-expansion"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")


@needs_triton
@interpreted
@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_kernel_computes_what_the_operators_of_torch_do(name: str, is_turned: bool) -> None:
    from zeroinf.model.quantized import expansion_kernels

    example, (stack, rows, columns) = EXAMPLES[name], (2, 32, 768)
    args = example.random(stack, rows, columns, torch.Generator().manual_seed(0))
    right = torch.empty(stack, rows, columns)
    getattr(torch.ops.zeroinf, example.operator)(right, *args)
    whole = torch.full((stack, rows + 3, columns + 16), torch.inf)  # with gaps between rows and matrices
    whole = whole.mT.contiguous().mT if is_turned else whole
    found = whole[:, :rows, :columns]
    getattr(expansion_kernels, example.operator)(found, *args)
    assert torch.equal(found.nan_to_num(), right.nan_to_num())
    found.fill_(torch.inf)
    assert whole.isinf().all()  # nothing is written beside it


@needs_triton
@pytest.mark.full
@pytest.mark.parametrize("capability", ["86", "90"])
def test_kernels_compile_to_few_instructions_and_wide_stores(capability: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--compile", capability]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {one["format"] for one in found} >= set(EXAMPLES)
    for one in found:
        assert one["stack"] == 0 and one["instructions_of_weight"] <= 22, one
        assert [move for move in one["moves"] if move.startswith("STG")] == ["STG.E.128"], one
