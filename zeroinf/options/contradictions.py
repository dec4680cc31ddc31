"""Refuses options that contradict each other or have no effect, before a model is looked up and before torch is
imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from zeroinf.errors import UsageError
from zeroinf.hardware.disk import read_disk
from zeroinf.hardware.machine import Disk
from zeroinf.jobs.output import check_output
from zeroinf.model.source import check_name
from zeroinf.options.options import RunOptions
from zeroinf.planner.constraints import check_micro_batch_rows
from zeroinf.planner.traits import EngineName, possible_offload, refuse_settings


def refuse_early(options: RunOptions) -> None:
    """Raise the error of whatever does not hold, as far as the options, files and this machine's disks say it."""
    if options.output_file is not None:
        check_output(options.output_file, overwrite=options.overwrite, resume=options.resume)
    engine, _ = choose_engine(options.engine, own_zero_config=options.zero_config is not None)
    if options.zero_config is None:  # else the JSON says where weights rest
        refuse_contradictions(options, engine, regroups=True)
        check_folders([read_disk(path) for path in options.nvme_paths])
    check_name(options.model, options.revision, random_weights=options.random_weights)


def choose_engine(asked: str, *, own_zero_config: bool) -> tuple[EngineName, str | None]:
    """The engine's name, and why `auto` did not take the stream engine.

    Raises UsageError when another engine than DeepSpeed's is asked to use its configuration.
    """
    obstacle = "--zero-config configures DeepSpeed's ZeRO" if own_zero_config else None
    if asked == "auto":
        return ("zero", obstacle) if obstacle else ("stream", None)
    if asked != "zero" and obstacle:
        raise UsageError(f"--engine {asked}: {obstacle}", hint="--engine zero, or --engine auto")
    return cast(EngineName, asked), None


def refuse_contradictions(options: RunOptions, engine: str, regroups: bool) -> None:
    """Refuse settings that would mean nothing with this engine, for a model whose rows can be regrouped or not."""
    parallel = options.tensor_parallel
    flags = {
        "--no-pin-memory": not options.pin_memory,
        "--static-batches": options.static_batches,
        "--wire": options.wire != "model",
        "several of --nvme-path": len(options.nvme_paths) > 1,
        "--tensor-parallel-size": parallel.size > 0,
        "--injection-policy": bool(parallel.injection_policy),
        "--checkpoint-json": parallel.checkpoint is not None,
        "--save-mp-checkpoint-path": parallel.save_to is not None,
    }
    refuse_settings(engine, given(flags))
    named = given({"--fetch": options.fetch != "auto", "--resident-blocks": options.resident_blocks is not None})
    refuse_settings(engine, named)
    if named and options.offload == "none":
        raise UsageError(f"{', '.join(named)} has no effect with --offload none: all blocks stay", hint="drop it")
    refuse_idle_paths(possible_offload(engine, options.offload), options.nvme_paths)
    check_micro_batch_rows(options.micro_batch_rows, options.batch_size, engine, regroups)


def refuse_idle_paths(offload: str, nvme_paths: Sequence[Path]) -> None:
    """Raise UsageError for folders where nothing would rest."""
    if nvme_paths and offload not in ("auto", "nvme"):
        raise UsageError(f"--nvme-path has no effect with --offload {offload}", hint="add --offload nvme, or drop it")


def given(flags: Mapping[str, bool]) -> list[str]:
    """Those of `flags` that are given."""
    return [flag for flag, is_given in flags.items() if is_given]


def check_folders(disks: Sequence[Disk]) -> None:
    """Raise UsageError for a folder of --nvme-path that cannot be written to, or stands there twice."""
    for disk in disks:
        if not disk.exists:
            raise UsageError(f"--nvme-path {disk.path} is not a folder", hint=f"mkdir -p {disk.path}")
        if not disk.writable:
            raise UsageError(f"--nvme-path {disk.path} is not writable", hint="choose another folder")
    if len({disk.path.resolve() for disk in disks}) < len(disks):
        raise UsageError("--nvme-path names the same folder twice", hint="name each disk's folder once")
