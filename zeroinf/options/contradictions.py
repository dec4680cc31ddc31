"""Refuses options that contradict each other or have no effect, by name, for runs and plans alike.

`refuse_idle` needs nothing but the options, so it comes before a model is looked for and before torch is imported;
`refuse_beside_model` knows the model and how many ranks there are.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from zeroinf.engines.registry import default_engine, descriptor_of, engines
from zeroinf.errors import UsageError
from zeroinf.hardware.disk import read_disk
from zeroinf.hardware.machine import Disk
from zeroinf.model.anatomy import Anatomy
from zeroinf.model.resolve import check_name
from zeroinf.options.definition import Options, definitions
from zeroinf.options.job_contradictions import check_output_of
from zeroinf.options.options import OffloadOptions, PlanOptions, RunOptions
from zeroinf.planner.constraints import check_micro_batch_rows
from zeroinf.planner.descriptor import possible_offload


def refuse_early(options: RunOptions) -> None:
    """Raise the error of whatever does not hold, as far as the options, files and this machine's disks say it."""
    check_output_of(options)
    options.settings()
    if options.zero_config is None:  # else the JSON says where weights rest
        check_folders([read_disk(path) for path in options.nvme_paths])
    check_name(options.model, options.revision, random_weights=options.random_weights)


def engine_of(options: RunOptions | PlanOptions) -> tuple[str, str | None]:
    """The engine's name, and why `auto` did not take the stream engine.

    Raises UsageError when another engine than DeepSpeed's is asked to use its configuration.
    """
    own_zero_config = isinstance(options, RunOptions) and options.zero_config is not None
    obstacle = "--zero-config configures DeepSpeed's ZeRO" if own_zero_config else None
    able = [one.name for one in engines() if not own_zero_config or "zero_config" in one.options]
    if options.engine == "auto":
        return (able[0], obstacle)
    if options.engine not in able:
        raise UsageError(f"--engine {options.engine}: {obstacle}", hint=f"--engine {able[0]}, or --engine auto")
    return options.engine, None


def refuse_idle(options: RunOptions | PlanOptions) -> None:
    """Raise UsageError for options that mean nothing beside the others, whatever the model and the machine."""
    engine, _ = engine_of(options)
    if isinstance(options, RunOptions) and options.zero_config is not None:
        if named := options.asked("offload", "nvme_paths", "pin_memory", "aio"):
            raise UsageError(f"{', '.join(named)} and --zero-config contradict each other", hint="set it in the JSON")
        refuse_other_engines(options, engine)
        return
    elsewhere = isinstance(options, PlanOptions) and bool(options.machine or options.nvme_space)
    refuse_idle_offload(options, engine, has_disk=elsewhere)
    if isinstance(options, PlanOptions):
        _refuse_idle_figures(options, engine)
    elif not options.nvme_paths and (unused := options.asked("aio")):
        raise UsageError(f"{', '.join(unused)} has no effect without --nvme-path", hint="add it, or drop the flag")
    if (named := options.asked("fetch", "resident_blocks")) and options.offload == "none":
        raise UsageError(f"{', '.join(named)} has no effect with --offload none: all layers stay", hint="drop it")
    check_micro_batch_rows(options.micro_batch_rows, options.batch_size, engine, regroups=True)


def refuse_idle_offload(options: OffloadOptions, engine: str, *, has_disk: bool = False) -> None:
    """Raise UsageError for settings of offload that would have no effect with `engine`, and for NVMe offload without a
    folder, unless there is a disk elsewhere."""
    if options.offload == "nvme" and not options.nvme_paths and not has_disk:
        raise UsageError("--offload nvme needs --nvme-path", hint="name a folder on a fast local disk")
    if options.offload not in ("nvme", "auto") and (unused := options.asked("nvme_paths", "aio")):
        raise UsageError(
            f"{', '.join(unused)} has no effect with --offload {options.offload}", hint="add --offload nvme, or drop it"
        )
    refuse_other_engines(options, engine)
    possible_offload(engine, options.offload)
    if options.nvme_paths and "nvme" not in descriptor_of(engine).offloads:
        raise UsageError(f"--nvme-path has no effect with the {engine} engine", hint="drop it")
    if len(options.nvme_paths) > 1 and not descriptor_of(engine).stripes:
        raise UsageError(
            f"the {engine} engine uses one --nvme-path", hint=f"--engine {default_engine()}, or name one folder"
        )
    if options.offload == "none" and (unused := options.asked("pin_memory")):
        raise UsageError(f"{unused[0]} has no effect with --offload none", hint="add --offload cpu, or drop it")


def refuse_other_engines(options: Options, engine: str) -> None:
    """Raise UsageError for options of other engines than `engine`."""
    own = [one for one in definitions(type(options)) if one.option.engine_specific and options.is_asked(one.name)]
    if idle := [one for one in own if one.path[0] not in descriptor_of(engine).options]:
        others = [
            name
            for name in sorted(each.name for each in engines())
            if any(one.path[0] in descriptor_of(name).options for one in idle)
        ]
        raise UsageError(
            f"{', '.join(map(options.flag_of, idle))} has no effect with the {engine} engine",
            hint=f"drop it, or --engine {' or '.join(others)}",
        )


def _refuse_idle_figures(options: PlanOptions, engine: str) -> None:
    """Figures of a job or a machine that a plan has no use for."""
    if options.input_files and (named := options.asked("input_len", "requests")):
        raise UsageError(f"{', '.join(named)} has no effect with -i, which says it", hint="drop one of them")
    if options.max_model_len is not None and not options.input_files:
        if options.asked("input_len"):
            raise UsageError("--input-len and --max-model-len both say how long prompts are", hint="drop one of them")
        check_room(options.max_model_len, "--output-len", options.output_len)
    if (named := options.asked("input_format", "shape")) and not options.input_files:
        raise UsageError(f"{', '.join(named)} has no effect without -i", hint="add -i FILE, or drop it")
    if options.shape.keep:
        raise UsageError("--keep-columns has no effect on a plan", hint="drop it")
    if not descriptor_of(engine).plans_pageable and not options.pin_memory:
        raise UsageError(
            "--no-pin-memory cannot be planned: link rates are those of page-locked memory", hint="drop it"
        )
    without_disk = ("nvme_space", "nvme_gbps") if options.offload in ("none", "cpu") else ()
    without_link = ("link_gbps",) if options.offload == "none" else ()
    if named := options.asked(*without_disk, *without_link):
        raise UsageError(f"{', '.join(named)} has no effect with --offload {options.offload}", hint="drop it")
    if options.machine is not None and options.nvme_paths:
        raise UsageError(
            "--nvme-path names a folder of this machine, --machine another one",
            hint="--nvme-space 1TB plans with a disk there",
        )


def refuse_beside_model(
    options: RunOptions | PlanOptions, engine: str, ranks: int, layers: int, *, regroups: bool
) -> None:
    """Raise UsageError for what means nothing for a model of so many layers, whose sequences can be regrouped or not,
    on so many ranks."""
    check_micro_batch_rows(options.micro_batch_rows, options.batch_size, engine, regroups)
    if options.fetch != "auto" and ranks == 1:
        raise UsageError(
            f"--fetch {options.fetch} has no effect with one rank", hint="drop it, or start several (--num-gpus)"
        )
    if options.resident_blocks is not None and options.resident_blocks > layers:
        raise UsageError(
            f"--resident-blocks {options.resident_blocks}, but the model has {layers} layers",
            hint="choose fewer, or --offload none to keep all of them on the GPU",
        )
    if options.resident_blocks == layers and (options.offload != "auto" or options.fetch != "auto"):
        raise UsageError(
            f"with --resident-blocks {layers} all layers stay on the GPU, and --offload and --fetch have no effect",
            hint="choose fewer, or --offload none alone",
        )


def prompt_room(max_prompt_tokens: int | None, max_model_len: int | None, new_tokens: int) -> int | None:
    """Tokens of the longest prompt by --max-prompt-tokens or --max-model-len; None where neither says it. Raises
    UsageError where both do, or none is left."""
    if max_model_len is None:
        return max_prompt_tokens
    if max_prompt_tokens is not None:
        raise UsageError(
            "--max-prompt-tokens and --max-model-len both say how long prompts are", hint="drop one of them"
        )
    check_room(max_model_len, "--max-new-tokens", new_tokens)
    return max_model_len - new_tokens


def check_room(max_model_len: int, flag: str, new_tokens: int) -> None:
    """Raise UsageError where completions of `new_tokens`, as `flag` says, leave no room for a prompt."""
    if max_model_len <= new_tokens:
        raise UsageError(
            f"--max-model-len {max_model_len} holds prompt and completion, and {flag} is {new_tokens}",
            hint=f"a smaller {flag}, or a larger --max-model-len",
        )


def check_max_model_len(max_model_len: int | None, anatomy: Anatomy) -> None:
    """Raise UsageError for more tokens than the model's context holds."""
    limit = anatomy.context_limit
    if max_model_len is not None and limit is not None and max_model_len > limit:
        raise UsageError(f"--max-model-len {max_model_len}, and the model's context holds {limit}", hint="lower it")


def check_folders(disks: Sequence[Disk]) -> None:
    """Raise UsageError for a folder of --nvme-path that cannot be written to, or stands there twice."""
    for disk in disks:
        if not disk.exists:
            raise UsageError(f"--nvme-path {disk.path} is not a folder", hint=f"mkdir -p {shlex.quote(str(disk.path))}")
        if not disk.writable:
            raise UsageError(f"--nvme-path {disk.path} is not writable", hint="choose another folder")
    if len({disk.path.resolve() for disk in disks}) < len(disks):
        raise UsageError("--nvme-path names the same folder twice", hint="name each disk's folder once")
