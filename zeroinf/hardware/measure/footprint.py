"""Measures the memory that a process takes of a GPU and of host memory besides tensors.

Run as a program, it uses the GPU as a model would.
"""

from __future__ import annotations

import gc
import json
import sys
from typing import TYPE_CHECKING

from zeroinf.hardware.gpus import read_used_bytes
from zeroinf.hardware.machine import Gpu
from zeroinf.hardware.measure.children import run_children
from zeroinf.hardware.process import resident

if TYPE_CHECKING:
    import torch


def measure_footprint(gpu: Gpu) -> dict[str, int]:
    """`context_bytes`, `workspace_bytes` and `process_bytes` of a fresh process on `gpu`.

    What others use of it must not change meanwhile.

    Raises EnvironmentProblem where that process fails.
    """
    (found,) = run_children(__name__, [[str(gpu.index), str(gpu.uuid)]])
    return {name: int(found[name]) for name in ("context_bytes", "workspace_bytes", "process_bytes")}


def _look(index: int, uuid: str) -> dict[str, int]:
    before_bytes = read_used_bytes(uuid)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401  # what every run loads

    device = torch.device("cuda", index)
    with torch.cuda.device(device), torch.inference_mode():
        for dtype in (torch.float16, torch.float32, torch.bfloat16):
            _use(device, dtype)
            _multiply(device, dtype, width=4096)
        _copy_both_ways(device)
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        held_bytes = read_used_bytes(uuid) - before_bytes
        return {
            "context_bytes": held_bytes - torch.cuda.memory_reserved(),
            "workspace_bytes": torch.cuda.memory_allocated(),
            "process_bytes": resident().total_bytes,
        }


def _use(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """One of each kind of kernel that a decoder and its sampler launch: CUDA loads a kernel when it is first used.

    Returns the logits, (rows, vocabulary).
    """
    import torch
    from torch.nn import functional

    rows, heads, length, width = 2, 16, 256, 64
    ids = torch.arange(rows * length, device=device).view(rows, length)
    table = torch.randn(rows * length, heads * width, device=device).mul(0.02).to(dtype)
    bias = table[0]
    hidden = functional.embedding(ids, table)
    hidden = functional.layer_norm(hidden, bias.shape, bias, bias) * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True))
    hidden = functional.linear(hidden, table.T @ table, bias) + functional.gelu(hidden) * functional.silu(hidden)
    query = hidden.view(rows, length, heads, width).transpose(1, 2)
    query = query.float().cos().to(dtype) + torch.cat((query[..., width // 2 :], -query[..., : width // 2]), -1)
    mask = torch.ones(rows, 1, length, length, dtype=torch.bool, device=device).tril()
    attend = functional.scaled_dot_product_attention
    whole = attend(query, query, query, is_causal=True) + attend(query, query, query, attn_mask=mask)
    last = attend(query[:, :, -1:], query, query, attn_mask=mask[:, :, -1:]) + whole[:, :, -1:]
    logits = functional.linear(last.reshape(rows, heads * width), table).float()
    ordered, _ = torch.sort(logits, descending=True)
    allowed = ordered.softmax(-1).cumsum(-1) < 0.9
    chosen = torch.multinomial(torch.where(allowed, logits, 0.0).softmax(-1), 1)
    logits.masked_fill(~allowed, float("-inf")).topk(4).values.gather(-1, chosen.clamp(max=3)).argmax(-1).tolist()
    return logits


def _multiply(device: torch.device, dtype: torch.dtype, *, width: int) -> None:
    """Products from one row to many: the libraries have other kernels for each size."""
    import torch

    weight = torch.randn(width, width, device=device).to(dtype)
    for rows in (1, 2, 8, 32, 128, 512, 2048, 8192):
        torch.nn.functional.linear(weight[:1].expand(rows, width), weight)


def _copy_both_ways(device: torch.device) -> None:
    import torch

    host = torch.ones(1 << 20, dtype=torch.uint8, pin_memory=True)
    with torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
        target = host.to(device, non_blocking=True)
        host.copy_(target, non_blocking=True)
    target.clone()


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_look(int(sys.argv[1]), sys.argv[2])) + "\n")
