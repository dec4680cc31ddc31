"""Codes become weights on a GPU as they do on the CPU, to the last bit; memory goes by the plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import run_zeroinf, write_jsonl
from small_models import make_checkpoint
from test_tokens_on_the_gpu import blocks_of, plain_tokens, tokens_of
from wire_reference import save_through_codes

from zeroinf.engines.stream.codes import SCALE_DTYPE, decode, encode
from zeroinf.planner.wire import CODES, Wire

pytestmark = pytest.mark.gpu

WIRES: list[Wire] = ["int8", "int4"]


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("groups", [1, 777, 1 << 16])
def test_the_kernel_computes_what_the_cpu_does(groups: int, dtype: torch.dtype, wire: Wire) -> None:
    from zeroinf.engines.stream.wire_kernels import decode_on_gpu

    kind, generator = CODES[wire], torch.Generator().manual_seed(groups)
    weights = torch.randn(groups, kind.group, generator=generator) * torch.rand(groups, 1, generator=generator)
    weights = weights.view(-1).to(dtype)
    codes = torch.empty(kind.nbytes(weights.numel()), dtype=torch.uint8)
    scales = torch.empty(groups, dtype=SCALE_DTYPE)
    encode(weights, dtype, kind, codes, scales)
    right, found = torch.empty_like(weights), torch.empty_like(weights, device="cuda")
    decode(codes, scales, kind, right)
    decode_on_gpu(codes.cuda(), scales.cuda(), kind, found)
    assert torch.equal(found.cpu().view(torch.uint8), right.view(torch.uint8))


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("elements", [5, 1 << 10, (1 << 21) + 333])
def test_a_gpu_makes_the_codes_that_the_cpu_makes(elements: int, dtype: torch.dtype, wire: Wire) -> None:
    kind, generator = CODES[wire], torch.Generator().manual_seed(elements)
    weights = torch.randn(elements, generator=generator) * torch.rand(elements, generator=generator)
    weights[: elements // 3] = 0
    groups = -(-elements // kind.group)
    made = []
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        codes = torch.empty(kind.nbytes(groups * kind.group), dtype=torch.uint8)
        scales = torch.empty(groups, dtype=SCALE_DTYPE)
        encode(weights, dtype, kind, codes, scales, device)
        made.append((codes, scales))
    assert torch.equal(made[0][0], made[1][0]) and torch.equal(made[0][1], made[1][1])


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize(("resident", "nvme"), [(0.0, 0.0), (0.4, 0.0), (1.0, 0.0), (0.4, 0.4)])
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_tokens_are_those_of_weights_after_the_round_trip(
    name: str, resident: float, nvme: float, wire: Wire, tmp_path: Path
) -> None:
    folder = make_checkpoint(name, tmp_path / name)
    blocks = blocks_of(folder)
    where = {"resident_blocks": round(resident * blocks), "nvme_blocks": round(nvme * blocks), "wire": wire}
    offload, paths = ("nvme", (tmp_path,)) if nvme else ("none" if resident == 1 else "cpu", ())
    found = tokens_of(folder, {}, offload=offload, nvme_paths=paths, **where)
    assert found == plain_tokens(save_through_codes(folder, wire, tmp_path / "coded"))


@pytest.mark.parametrize("resident", ["0", "4"])
def test_a_run_with_codes_takes_what_its_plan_said(resident: str, tmp_path: Path) -> None:
    prompts = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "x" * (40 + i), "ignore_eos": True} for i in range(64)])
    arguments = ["-m", "pythia-160m", "--random-weights", "-i", str(prompts), "-o", str(tmp_path / "out.jsonl")]
    how = ["--wire", "int4", "--offload", "cpu", "--resident-blocks", resident, "--gpu-memory", "8GiB"]
    done = run_zeroinf([*arguments, *how, "--max-new-tokens", "16", "--report", str(tmp_path / "report.json")])
    assert done.code == 0, done.err
    compared = {one["name"]: one for one in json.loads((tmp_path / "report.json").read_text())["compared"]}
    for name in ("weights that stay", "slots"):
        assert compared[name]["measured"] == pytest.approx(compared[name]["predicted"], abs=2 << 20)
    for name in ("allocated", "reserved"):
        assert 0 < compared[name]["measured"] <= compared[name]["predicted"]
