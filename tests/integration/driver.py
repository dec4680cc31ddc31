"""Runs many (checkpoint, offload) cells in one process group; rank 0 writes every row's tokens as JSON.

`main(CELLS.json, RESULT.json)` runs alone, or on each rank with RANK, WORLD_SIZE and so on set.

A cell is `{"name", "model", "engine", "fetch", "offload", "nvme_path", "input", "batch_size", "max_new_tokens",
"dtype", "parallel"}`, the last for tensor parallelism: `{"injection_policy", "checkpoint", "save_to"}`.
Everything between the command line and the output file is zeroinf's own; only starting a process for each is saved.
"""

from __future__ import annotations

import json
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from observers import Deaf

from zeroinf.distributed.control import Control
from zeroinf.distributed.world import World, world_from_environment
from zeroinf.generation.loop import Feed
from zeroinf.generation.row import Row, Sampling
from zeroinf.model.resolve import resolve_model
from zeroinf.options.options import RunOptions
from zeroinf.planner.plan import TensorParallel
from zeroinf.runs.prepare import prepare, read_job
from zeroinf.runs.request_feed import RequestFeed
from zeroinf.service.loaded import LoadedModel


def _parallel(
    injection_policy: list[Any] | None = None, checkpoint: str | None = None, save_to: str | None = None
) -> TensorParallel:
    return TensorParallel(
        size=0,
        injection_policy=tuple((name, tuple(layers)) for name, layers in injection_policy or ()),
        checkpoint=Path(checkpoint) if checkpoint else None,
        save_to=Path(save_to) if save_to else None,
    )


def run_cell(cell: dict[str, Any], world: World, control: Control) -> dict[str, Any]:
    """One run without command line, journal and report. Tokens by request index, this rank's alone."""
    options = RunOptions(
        model=cell["model"],
        sampling=Sampling(max_new_tokens=cell["max_new_tokens"]),
        dtype=cell["dtype"],
        engine=cell["engine"],
        fetch=cell["fetch"],
        offload=cell["offload"],
        nvme_paths=(Path(cell["nvme_path"]),) if cell["offload"] == "nvme" else (),
        input_files=(cell["input"],),
        batch_size=cell["batch_size"],
        tensor_parallel=_parallel(**cell["parallel"]),
    )
    source = resolve_model(options.model)
    reading = read_job(options, source, "cpu")
    prepared = prepare(options, source, reading, reading.job.work, world, "cpu")
    model = LoadedModel(prepared.plan, source, control, torch.device("cpu"), Deaf(), zero_config=prepared.zero_config)
    engine = model.engine
    try:
        stream = RequestFeed(prepared, model, control.store, None, Deaf())
        rows: list[Row] = []
        model.run(Feed(take=stream.take, done=rows.append, grew=stream.grew))
        on_disk = sum(file.stat().st_size for file in Path(cell["nvme_path"]).rglob("*") if file.is_file())
        control.all_gather(None)  # no rank removes its files while another counts
        return {
            "tokens": {row.index: row.generated for row in rows},
            "finish": {row.index: row.finish_reason for row in rows},
            "batch_size": prepared.plan.batch_size,
            "prompts": [list(work.prompt) for work in prepared.work],
            "pad_token": model.pad_token,
            "forwards": engine.stats().passes,
            "bytes_on_disk": on_disk,
            "partitioned": all(
                p.numel() == 0 for p in engine.model.parameters() if not getattr(p, "ds_persist", False)
            ),
        }
    finally:
        model.close()


def main(cells_file: str, result_file: str) -> None:
    world = world_from_environment()
    control = Control(world, "cpu")
    shared = control.store
    results: dict[str, Any] = {}
    for cell in json.loads(Path(cells_file).read_text(encoding="utf-8")):
        control.store = dist.PrefixStore(cell["name"], shared) if world.size > 1 else dist.HashStore()
        started = time.monotonic()
        try:
            mine = run_cell(cell, world, control)
        except Exception:
            mine = {"error": traceback.format_exc()}
        parts = control.all_gather(mine)
        results[cell["name"]] = {"ranks": parts, "seconds": time.monotonic() - started}
        if world.is_main:  # written each time: a cell that hangs does not take the others with it
            partial = Path(result_file + ".partial")
            partial.write_text(json.dumps(results), encoding="utf-8")
            partial.replace(result_file)
        if any("error" in part for part in parts):
            break
    control.close()
