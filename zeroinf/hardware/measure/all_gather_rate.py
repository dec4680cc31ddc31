"""Measures NCCL's all-gather rate and the GPU memory that NCCL takes. Run as a program, it is one rank."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from zeroinf.hardware.gpus import read_used_bytes
from zeroinf.hardware.machine import Gpu
from zeroinf.hardware.measure.children import run_children

_WHOLE_BYTES = 1 << 30
_REPEATS = 10


def measure_all_gather(gpus: Sequence[Gpu]) -> tuple[float, int]:
    """GB/s of 1 GiB that `gpus` gather, each a share, by the slowest; and the bytes that NCCL takes of the worst off.

    Raises EnvironmentProblem where a rank fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "store")
        ranks = [[str(r), str(len(gpus)), str(gpu.index), str(gpu.uuid), meeting] for r, gpu in enumerate(gpus)]
        found = run_children(__name__, ranks)
    return min(rank["gbps"] for rank in found), max(int(rank["nccl_bytes"]) for rank in found)


def _gather(rank: int, ranks: int, index: int, uuid: str, meeting: str) -> dict[str, float]:
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    share = torch.ones(_WHOLE_BYTES // ranks, dtype=torch.uint8, device=device)
    whole = torch.empty(share.numel() * ranks, dtype=torch.uint8, device=device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    before_bytes = read_used_bytes(uuid)
    store = dist.FileStore(meeting, ranks)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=ranks, device_id=device)
    dist.all_gather_into_tensor(whole, share)
    torch.cuda.synchronize()
    nccl_bytes = read_used_bytes(uuid) - before_bytes
    begin.record()
    for _ in range(_REPEATS):
        dist.all_gather_into_tensor(whole, share)
    end.record()
    end.synchronize()
    dist.destroy_process_group()
    return {"nccl_bytes": nccl_bytes, "gbps": _REPEATS * whole.numel() / begin.elapsed_time(end) / 1e6}


if __name__ == "__main__":
    _rank, _ranks, _index, _uuid, _meeting = sys.argv[1:]
    sys.stdout.write(json.dumps(_gather(int(_rank), int(_ranks), int(_index), _uuid, _meeting)) + "\n")
