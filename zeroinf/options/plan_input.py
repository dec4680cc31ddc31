"""Builds the planner's input for `zeroinf plan`: the user's options, the model, and a machine that may be another
one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from zeroinf.engines.registry import descriptor_of
from zeroinf.engines.stream.stored_weights import room_taken
from zeroinf.errors import InputError, ModelError, UsageError
from zeroinf.generation.row import Sampling
from zeroinf.hardware.gpus import gpus_are_linked
from zeroinf.hardware.host_library import why_no_host_kernel
from zeroinf.hardware.machine import Gpu, Machine
from zeroinf.hardware.override import override
from zeroinf.hardware.presets import load_machine, with_gpu
from zeroinf.hardware.profile import read_profile
from zeroinf.hardware.rates import Rates
from zeroinf.hardware.snapshot import read_machine
from zeroinf.jobs.inputs import find_inputs
from zeroinf.jobs.readers import none_can_run, read_inputs
from zeroinf.jobs.tokenizing import groups_of, lengths_of, tokenize
from zeroinf.jobs.work_list import request_bytes
from zeroinf.model.anatomy import Anatomy
from zeroinf.model.catalog import catalog_quantized
from zeroinf.model.source import ModelSource
from zeroinf.model.tokenizer import load_tokenizer
from zeroinf.model.weights import weight_files
from zeroinf.options.contradictions import (
    check_folders,
    check_max_model_len,
    engine_of,
    refuse_beside_model,
    refuse_idle,
)
from zeroinf.options.model import anatomy_of, source_of
from zeroinf.options.options import PlanOptions
from zeroinf.options.planning import (
    constraints_of,
    loading_of,
    packed_on,
    plan_input_from,
    share_model,
    unreadable_rows,
)
from zeroinf.planner.unified import divided
from zeroinf.planner.workload import Lengths
from zeroinf.service.text import TextCodec
from zeroinf.simulation.make_plan import PlanInput, sketch_plan

# GPUs of which one has at least this part of the other's free memory are planned as one size.
_ALIKE = 0.95


def plan_input_of(
    options: PlanOptions, gpus: tuple[Gpu, ...] | None = None, known: PlanInput | None = None
) -> PlanInput:
    """The planner's question, for some of the machine's GPUs or all; `known` is one for the same job. Raises UsageError
    for what is without effect, or impossible, on that machine."""
    refuse_idle(options)
    machine, rates = machine_of(options)
    if gpus is not None:
        machine = replace(machine, gpus=gpus)
    engine, _ = engine_of(options)
    device: Literal["cuda", "cpu"] = "cuda" if machine.gpus else "cpu"
    source = source_of(options, device)
    loaded = _loaded(options, source)
    anatomy = _as_run(options, loaded, anatomy_of(options, source, device), machine)
    ranks = max(1, len(machine.gpus))
    lengths, requests = (known.lengths, known.constraints.requests) if known else _job(options, source, anatomy, ranks)
    machine = divided(machine, anatomy, lengths.request_bytes)
    _refuse_impossible(options, engine, machine, anatomy)
    parallel = share_model(options.tensor_parallel, engine, anatomy, ranks)
    constraints = constraints_of(
        options if requests == options.requests else replace(options, requests=requests),
        engine,
        anatomy,
        world_size=ranks,
        ranks_per_stream=parallel.size,
        nvme_space_bytes=_nvme_space(options, machine, loaded, anatomy),
        names_folders=options.machine is None,
        gpus_are_linked=not _is_here(options, machine) or gpus_are_linked(ranks),
        no_host_kernel=why_no_host_kernel() if _is_here(options, machine) else "",
    )
    return plan_input_from(
        options,
        source,
        anatomy,
        constraints,
        machine=machine,
        rates=rates,
        lengths=lengths,
        device=device,
        nvme_paths=options.nvme_paths or tuple(disk.path for disk in machine.disks),
        tensor_parallel=parallel,
        checkpoints=catalog_quantized(source.location),
    )


def _job(options: PlanOptions, source: ModelSource, anatomy: Anatomy, ranks: int) -> tuple[Lengths, int | None]:
    """The lengths of the job, and the number of its requests: those of the input where there is one.

    Raises InputError where nothing of the input can be run, ModelError where its model's tokenizer is not to be had.
    """
    if not options.input_files:
        return Lengths(prompt_tokens=options.prompt_tokens, new_tokens=options.output_len), options.requests
    defaults = Sampling(max_new_tokens=options.output_len)
    files = find_inputs(options.input_files)
    entries = read_inputs((), files, defaults, input_format=options.input_format, shape=options.shape)
    try:
        tokenizer = load_tokenizer(source if options.random_weights else replace(source, random_weights=False))
    except ModelError as error:
        hint = "name a folder that has one, or say --input-len, --output-len and --requests"
        raise ModelError(f"-i takes the model's tokenizer: {error.message.splitlines()[0]}", hint=hint) from error
    codec = TextCodec(tokenizer, anatomy, most_tokens=options.max_model_len)
    work = (read := tokenize(entries, codec, None, None, keeps_text=False)).work
    if not work:
        raise InputError(none_can_run(read.refusals))
    lengths = lengths_of(anatomy, work, groups_of(work) if options.share_prefixes else None)
    return replace(lengths, request_bytes=request_bytes(len(work), ranks)), len(work)


def input_of_best_gpus(options: PlanOptions) -> PlanInput:
    """The planner's question for those of a machine's GPUs that together give most tokens/s, which says so.

    Ranks hold as much as the GPU with the least memory does: a small GPU, or a busy one, can cost more than it brings.
    Where the user says how many there are, or all are alike, all are taken. Raises the errors of `plan_input_of`.
    """
    whole = plan_input_of(options)
    groups = list(_groups(whole.machine.gpus)) if options.num_gpus is None and whole.tensor_parallel.size == 1 else []
    if len(groups) < 2 or not descriptor_of(whole.constraints.engine).is_timed:
        return whole
    inputs = [whole if len(gpus) == len(whole.machine.gpus) else plan_input_of(options, gpus, whole) for gpus in groups]
    rates = [_coarse_rate(one) for one in inputs]
    best = max(range(len(groups)), key=lambda at: (rates[at], len(groups[at])))
    if len(groups[best]) == len(whole.machine.gpus):
        return whole
    every = f"{rates[-1]:,.1f} tokens/s at first sight" if rates[-1] else "nothing would fit"
    numbers = ",".join(str(gpu.index) for gpu in groups[best])
    chosen = (
        f"{len(groups[best])} of {len(whole.machine.gpus)} (CUDA_VISIBLE_DEVICES={numbers}): with all, as large as the "
        f"least, {every} where these give {rates[best]:,.1f}"
    )
    return replace(inputs[best], gpus_chosen=chosen)


def _groups(gpus: tuple[Gpu, ...]) -> Iterator[tuple[Gpu, ...]]:
    """The GPUs with the most free memory, so many that one more would have clearly less; all of them last."""
    by_size = sorted(gpus, key=lambda gpu: -gpu.free_bytes)
    for count in range(1, len(gpus) + 1):
        if count == len(gpus) or by_size[count].free_bytes < _ALIKE * by_size[count - 1].free_bytes:
            yield tuple(sorted(by_size[:count], key=lambda gpu: gpu.index))


def _coarse_rate(plan_input: PlanInput) -> float:
    found, _ = sketch_plan(plan_input, advise=False)
    return found[0].candidate.timing.tokens_per_second if found else 0.0


def _is_here(options: PlanOptions, machine: Machine) -> bool:
    """Whether the plan is for GPUs of this machine."""
    return options.machine is None and any(gpu.uuid for gpu in machine.gpus)


def _as_run(options: PlanOptions, loaded: ModelSource | None, anatomy: Anatomy, machine: Machine) -> Anatomy:
    """The anatomy, with how a run would load these weights and whether its forwards could be packed on its GPUs."""
    if _is_here(options, machine):
        anatomy = packed_on(anatomy, "cuda")
    if loaded is None:
        return anatomy
    return replace(anatomy, loads=loading_of(loaded, anatomy), unreadable_rows=unreadable_rows(loaded, anatomy))


def _loaded(options: PlanOptions, source: ModelSource) -> ModelSource | None:
    """The source that a run would load; None where its weights are not on this machine."""
    if options.random_weights:
        return source
    try:
        own = replace(source, random_weights=False)
        return own if source.is_local and weight_files(own) else None
    except ModelError:  # a folder with nothing but a config can be planned
        return None


def _nvme_space(options: PlanOptions, machine: Machine, loaded: ModelSource | None, anatomy: Anatomy) -> int | None:
    """Bytes that a store can take of the disks; None without any. One that is there already has its room."""
    if not machine.disks:
        return None
    free = sum(disk.free_bytes for disk in machine.disks)
    return free if loaded is None else free + room_taken(options.nvme_paths, loaded, anatomy.dtype, options.wire)


def _refuse_impossible(options: PlanOptions, engine: str, machine: Machine, anatomy: Anatomy) -> None:
    """Refuse options that would have no effect with the machine or the model, or are impossible."""
    if options.offload == "nvme" and not machine.disks:
        raise UsageError("--offload nvme: the machine has no disk", hint="add --nvme-space")
    refuse_beside_model(options, engine, max(1, len(machine.gpus)), len(anatomy.blocks), regroups=anatomy.is_paged)
    check_max_model_len(options.max_model_len, anatomy)
    if options.input_files:
        return
    tokens = anatomy.positions(options.input_len, options.output_len)
    if options.max_model_len is None and anatomy.context_limit is not None and tokens > anatomy.context_limit:
        raise UsageError(
            f"--input-len and --output-len take {tokens} positions, the model's context is {anatomy.context_limit}",
            hint="shorten one of them",
        )


def machine_of(options: PlanOptions) -> tuple[Machine, Rates]:
    """The machine to plan for: this one or the one named, with what the options say instead."""
    if options.machine is None:
        machine = read_machine(options.nvme_paths)
        check_folders(machine.disks)
        rates = read_profile(machine)
    else:
        file = load_machine(options.machine)
        machine, rates = file.machine, file.rates
    if options.gpu is not None:
        machine, rates = with_gpu(machine, rates, options.gpu)
    return override(
        machine,
        rates,
        gpu_memory=options.gpu_memory,
        host_memory=options.host_memory,
        nvme_space=options.nvme_space,
        num_gpus=options.num_gpus,
        link_gbps=options.link_gbps,
        nvme_gbps=options.nvme_gbps,
    )
