"""Builds the planner's input for `zeroinf plan`: the user's options, the model, and a machine that may be another
one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from zeroinf.errors import UsageError
from zeroinf.hardware.machine import Machine
from zeroinf.hardware.override import override
from zeroinf.hardware.presets import load_machine
from zeroinf.hardware.profile import read_profile
from zeroinf.hardware.rates import Rates
from zeroinf.hardware.snapshot import read_machine
from zeroinf.model.anatomy import Anatomy, KvDtype
from zeroinf.model.inspect import read_anatomy
from zeroinf.model.source import pick_dtype, resolve_model
from zeroinf.options.contradictions import choose_engine, refuse_idle_paths
from zeroinf.options.planning import share_model
from zeroinf.planner.choice import Fetch, Offload
from zeroinf.planner.constraints import Constraints, check_micro_batch_rows
from zeroinf.planner.kv import Kv, host_share
from zeroinf.planner.plan import AioSettings, TensorParallel
from zeroinf.planner.traits import expands_once, needs_full_weights, possible_offload, refuse_settings
from zeroinf.planner.wire import Wire
from zeroinf.planner.workload import Lengths
from zeroinf.simulation.planning import PlanInput


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """Options of `zeroinf plan`; None leaves a setting to the machine or the planner."""

    model: str
    revision: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    engine: str = "auto"
    tensor_parallel_size: int | None = None
    fetch: Fetch | Literal["auto"] = "auto"
    resident_blocks: int | None = None
    batch_size: int | None = None
    micro_batch_rows: int | None = None
    wire: Wire = "model"
    kv: Kv = "auto"
    kv_dtype: KvDtype = "model"
    offload: Offload | Literal["auto"] = "auto"
    nvme_paths: tuple[Path, ...] = ()
    pin_memory: bool = True
    aio: AioSettings = field(default_factory=AioSettings)
    input_len: int = 512
    output_len: int = 128
    requests: int | None = None
    num_gpus: int | None = None
    machine_name: str | None = None
    gpu_memory: int | None = None
    host_memory: int | None = None
    nvme_space: int | None = None
    link_gbps: float | None = None
    nvme_gbps: float | None = None


def plan_input_of(options: PlanOptions) -> PlanInput:
    """The planner's question. Raises UsageError for what is without effect, or impossible, on that machine."""
    machine, rates = _machine(options)
    engine, _ = choose_engine(options.engine, own_zero_config=False)
    device: Literal["cuda", "cpu"] = "cuda" if machine.gpus else "cpu"
    # Only shapes are wanted, so the catalog's will do; it knows no revisions.
    source = resolve_model(
        options.model,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        random_weights=options.revision is None,
        in_full=needs_full_weights(engine, options.wire),
        expands_once=expands_once(device, options.offload),
    )
    dtype = pick_dtype(options.dtype, source, device)
    anatomy = read_anatomy(source.config, dtype=dtype, trust_remote_code=options.trust_remote_code)
    _refuse_impossible(options, engine, machine, anatomy)
    ranks = max(1, len(machine.gpus))
    parallel = share_model(TensorParallel(size=options.tensor_parallel_size or 0), engine, anatomy, ranks)
    constraints = Constraints(
        engine=engine,
        world_size=ranks,
        ranks_per_stream=parallel.size,
        offload=possible_offload(engine, options.offload),
        fetch=options.fetch,
        batch_size=options.batch_size,
        micro_batch_rows=options.micro_batch_rows,
        resident_blocks=options.resident_blocks,
        wire=options.wire,
        host_share=host_share(options.kv, options.kv_dtype, engine, anatomy),
        kv_dtype=options.kv_dtype,
        requests=options.requests,
        nvme_space_bytes=sum(disk.free_bytes for disk in machine.disks) if machine.disks else None,
    )
    return PlanInput(
        config=source.config,
        anatomy=anatomy,
        machine=machine,
        rates=rates,
        constraints=constraints,
        lengths=Lengths(prompt_tokens=options.input_len, new_tokens=options.output_len),
        device=device,
        nvme_paths=options.nvme_paths or tuple(disk.path for disk in machine.disks),
        pin_memory=options.pin_memory,
        aio=options.aio,
        tensor_parallel=parallel,
        trust_remote_code=options.trust_remote_code,
    )


def _refuse_impossible(options: PlanOptions, engine: str, machine: Machine, anatomy: Anatomy) -> None:
    """What would have no effect with the engine, the machine or the model, or is impossible."""
    given = {
        "--fetch": options.fetch != "auto",
        "--resident-blocks": options.resident_blocks is not None,
        "--wire": options.wire != "model",
        "--tensor-parallel-size": options.tensor_parallel_size is not None,
    }
    refuse_settings(engine, [flag for flag, is_given in given.items() if is_given])
    refuse_idle_paths(possible_offload(engine, options.offload), options.nvme_paths)
    if options.offload == "none" and options.resident_blocks is not None:
        raise UsageError("--resident-blocks has no effect with --offload none: all are", hint="drop one of them")
    if options.offload == "nvme" and not machine.disks:
        raise UsageError("--offload nvme: the machine has no disk", hint="add --nvme-space")
    if options.fetch != "auto" and len(machine.gpus) < 2:
        raise UsageError(f"--fetch {options.fetch} has no effect with one GPU", hint="drop it, or add --num-gpus")
    check_micro_batch_rows(options.micro_batch_rows, options.batch_size, engine, anatomy.is_paged)
    blocks, resident = len(anatomy.blocks), options.resident_blocks or 0
    if resident > blocks:
        raise UsageError(f"--resident-blocks {resident}: the model has {blocks} blocks", hint=f"at most {blocks}")
    if resident == blocks and (options.offload != "auto" or options.fetch != "auto"):
        raise UsageError(
            f"with --resident-blocks {blocks} all blocks stay, and --offload and --fetch have no effect",
            hint="--offload none says the same",
        )
    tokens = anatomy.positions(options.input_len, options.output_len)
    if anatomy.context_limit is not None and tokens > anatomy.context_limit:
        raise UsageError(
            f"--input-len and --output-len take {tokens} positions, the model's context is {anatomy.context_limit}",
            hint="shorten one of them",
        )


def _machine(options: PlanOptions) -> tuple[Machine, Rates]:
    """The machine to plan for: this one or the one named, with what the options say instead."""
    if options.machine_name is None:
        machine = read_machine(options.nvme_paths)
        rates = read_profile(machine)
    else:
        if options.nvme_paths:
            raise UsageError("--nvme-path names a folder of this machine, --machine another one", hint="drop one")
        file = load_machine(options.machine_name)
        machine, rates = file.machine, file.rates
    missing = next((disk for disk in machine.disks if not disk.exists), None)
    if options.machine_name is None and missing is not None:
        raise UsageError(f"--nvme-path {missing.path} is not a folder", hint=f"mkdir -p {missing.path}")
    return override(
        machine,
        rates,
        gpu_memory_bytes=options.gpu_memory,
        host_memory_bytes=options.host_memory,
        nvme_space_bytes=options.nvme_space,
        num_gpus=options.num_gpus,
        link_gbps=options.link_gbps,
        nvme_gbps=options.nvme_gbps,
    )
