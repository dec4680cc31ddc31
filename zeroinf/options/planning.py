"""Plans a run: resolves the options, reads this machine's present state, and asks the planner."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from transformers import GenerationMixin

from zeroinf.distributed.world import World
from zeroinf.engines.registry import default_engine, descriptor_of
from zeroinf.engines.stream.stored_weights import room_taken
from zeroinf.engines.zero.config import check_user_config, codes_of
from zeroinf.errors import ModelError, UsageError
from zeroinf.generation.micro_batch import TokenRules
from zeroinf.generation.prompts import decoder_start
from zeroinf.hardware.gpus import gpus_are_linked
from zeroinf.hardware.host_library import why_no_host_kernel
from zeroinf.hardware.machine import Disk, Machine
from zeroinf.hardware.override import override
from zeroinf.hardware.profile import read_profile
from zeroinf.hardware.rates import Rates
from zeroinf.hardware.snapshot import read_machine
from zeroinf.hardware.triton import why_no_kernels
from zeroinf.model.anatomy import Anatomy, Loading
from zeroinf.model.config import config_dtype
from zeroinf.model.skeleton import read_generation_config
from zeroinf.model.source import ModelSource
from zeroinf.model.weights import can_be_converted, weight_files
from zeroinf.options.contradictions import check_folders, engine_of, refuse_beside_model, refuse_idle
from zeroinf.options.definition import definitions
from zeroinf.options.measured_plan import plan_with_measured_rates
from zeroinf.options.options import PlanOptions, RunOptions
from zeroinf.planner.choice import Offload
from zeroinf.planner.constraints import Constraints, check_embeddings, check_expert_parts, check_routed_tokens
from zeroinf.planner.descriptor import as_run_by, possible_offload
from zeroinf.planner.kv import check_kv_attention, host_share
from zeroinf.planner.plan import Plan, TensorParallel
from zeroinf.planner.unified import divided
from zeroinf.planner.workload import Lengths
from zeroinf.simulation.make_plan import PlanInput, plan_as_requested


def plan_run(
    options: RunOptions,
    source: ModelSource,
    anatomy: Anatomy,
    lengths: Lengths,
    requests: int | None,
    world: World,
    device: str,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Plan, dict[str, Any] | None, str | None]:
    """The plan, the user's own DeepSpeed JSON if there is one, and why `auto` did not take the stream engine.
    `say` gets what is measured for it.

    Raises ModelError for a generation config that cannot be carried out, UsageError for what contradicts itself,
    EnvironmentProblem for what the machine lacks, DoesNotFitError when nothing fits; all before anything is allocated
    on a GPU.
    """
    _check_generation(source, anatomy)
    own_config = None if options.zero_config is None else _read_zero_config(options.zero_config)
    engine, why = engine_of(options)
    _refuse_idle(options, engine, world, device, anatomy)
    if own_config is not None:
        offload, nvme_paths = _offload_of(own_config)
        options = replace(options, offload=offload, nvme_paths=nvme_paths)
    parallel = share_model(options.tensor_parallel, engine, anatomy, world.size)
    anatomy = _as_run(anatomy, source, device)
    machine, rates = _machine(options, lengths, world, device)
    machine = divided(machine, anatomy, lengths.request_bytes)
    plan_input = plan_input_from(
        options,
        source,
        anatomy,
        constraints_of(
            options,
            engine,
            anatomy,
            world_size=world.size,
            ranks_per_stream=parallel.size,
            requests=requests,
            nvme_space_bytes=_nvme_space(options, machine.disks, source, anatomy.dtype, engine),
            one_node=world.local_size == world.size,
            gpus_are_linked=bool(machine.gpus) and gpus_are_linked(world.local_size),
            no_host_kernel=why_no_host_kernel(),
        ),
        machine=machine,
        rates=rates,
        lengths=lengths,
        device="cuda" if device == "cuda" else "cpu",
        tensor_parallel=parallel,
        own_zero_config=own_config,
    )
    if own_config is not None:
        check_user_config(own_config, plan_as_requested(plan_input))
    plan = plan_with_measured_rates(plan_input, say)
    if plan.offload == "nvme":
        descriptor_of(plan.engine).check_disks(plan, source, machine.disks, own_config)
    return plan if own_config is None else _with_codes(plan, own_config, source), own_config, why


def constraints_of(options: RunOptions | PlanOptions, engine: str, anatomy: Anatomy, **facts: Any) -> Constraints:
    """The planner's constraints: options of the same names as they are, and `facts` about ranks and disks.

    Raises UsageError for what the engine or the model cannot do."""
    check_embeddings(options.embeddings, anatomy)
    check_expert_parts(options.expert_parts, options.fetch, anatomy)
    check_routed_tokens(options.routed_tokens, options.expert_parts, options.offload, options.wire, anatomy)
    check_kv_attention(options.kv_attention, options.kv, engine, anatomy)
    names = {each.name for each in fields(Constraints)} & {one.path[0] for one in definitions(type(options))}
    chosen = {name: getattr(options, name) for name in names} | facts
    return Constraints(
        **chosen
        | {
            "engine": engine,
            "offload": possible_offload(engine, options.offload),
            "host_share": host_share(options.kv, options.kv_dtype, engine, anatomy),
        }
    )


def plan_input_from(
    options: RunOptions | PlanOptions, source: ModelSource, anatomy: Anatomy, constraints: Constraints, **more: Any
) -> PlanInput:
    """The planner's input; `more` is what neither options nor the model say."""
    return PlanInput(
        config=source.config,
        anatomy=as_run_by(anatomy, constraints.engine),
        constraints=constraints,
        pin_memory=options.pin_memory,
        aio=options.aio,
        trust_remote_code=options.trust_remote_code,
        **{"nvme_paths": options.nvme_paths} | more,
    )


def _as_run(anatomy: Anatomy, source: ModelSource, device: str) -> Anatomy:
    """The anatomy, with how the weights of this checkpoint are loaded and whether its forwards can be packed here."""
    return replace(
        packed_on(anatomy, device),
        loads=loading_of(source, anatomy),
        unreadable_rows=unreadable_rows(source, anatomy),
    )


def _machine(options: RunOptions, lengths: Lengths, world: World, device: str) -> tuple[Machine, Rates]:
    """This machine as it is now and its rates, within the limits of the options."""
    machine = read_machine(options.nvme_paths)
    check_folders(machine.disks)
    # What requests hold is not free any more, and a term of every plan.
    available = machine.memory.available_bytes + lengths.request_bytes
    machine = replace(machine, memory=replace(machine.memory, available_bytes=available))
    cap = options.host_memory
    return override(
        replace(machine, gpus=machine.gpus[: world.local_size] if device == "cuda" else ()),
        read_profile(machine),
        gpu_memory=options.gpu_memory,
        # `override` takes a larger host for another machine's; here it is a limit.
        host_memory=None if cap is None else min(cap, machine.memory.total_bytes),
    )


class _Unloaded(GenerationMixin):  # type: ignore[misc]
    """Stands for a model where transformers' generation asks for its config before any forward."""

    def __init__(self, config: Any, generation_config: Any) -> None:
        self.config, self.generation_config = config, generation_config


def _check_generation(source: ModelSource, anatomy: Anatomy) -> None:
    """Raises ModelError for settings of the checkpoint's generation config that are not, or cannot be, carried out."""
    model = _Unloaded(source.config, read_generation_config(source))
    TokenRules(model, None, ()).try_out(anatomy.vocabulary)
    if anatomy.encoder is not None and (start := decoder_start(model)) >= anatomy.vocabulary:
        raise ModelError(
            f"decoders of {source.name} begin with token {start}, but the model has embeddings for "
            f"{anatomy.vocabulary} tokens",
            hint="correct decoder_start_token_id in generation_config.json",
        )


def _with_codes(plan: Plan, own_config: Mapping[str, Any], source: ModelSource) -> Plan:
    """The plan with weights named as the JSON has them."""
    codes = codes_of(own_config)
    if codes == "model":
        return plan
    own = config_dtype(source.config)
    if own != plan.dtype and not source.random_weights:
        raise UsageError(
            f"weight_quantization: DeepSpeed makes codes of weights as they are stored, here {own}, and the model "
            f"runs in {plan.dtype}",
            hint=f"--dtype {own}, and a --zero-config for it",
        )
    return replace(plan, wire=codes)


def share_model(asked: TensorParallel, engine: str, anatomy: Anatomy, ranks: int) -> TensorParallel:
    """The split that was asked for, with the ranks of a group: all, unless the user says how many.

    Raises UsageError where `ranks` cannot hold the model together like that.
    """
    if "tensor_parallel" not in descriptor_of(engine).options:
        return TensorParallel()
    size = asked.size or ranks
    if ranks % size:
        raise UsageError(
            f"--tensor-parallel-size {size} with {ranks} ranks: groups must be of equal size",
            hint=f"start a multiple of {size} ranks (--num-gpus)",
        )
    if asked.save_to is not None and not 1 < size == ranks:
        raise UsageError("--save-mp-checkpoint-path needs one group of two ranks or more", hint="add --num-gpus N")
    try:
        anatomy.with_heads_shared(size, 0)
    except ValueError as error:
        raise UsageError(
            f"--tensor-parallel-size {size}: {anatomy.architecture}: {error}",
            hint=f"a --tensor-parallel-size of at most that many, or --engine {default_engine()}",
        ) from error
    return replace(asked, size=size)


def _nvme_space(options: RunOptions, disks: Sequence[Disk], source: ModelSource, dtype: str, engine: str) -> int | None:
    """Bytes that a store can take of the disks, None without any or where the user says where weights rest; a store
    that is there already has its room."""
    if not disks or possible_offload(engine, options.offload) != "auto":
        return None
    return sum(disk.free_bytes for disk in disks) + room_taken(
        [disk.path for disk in disks], source, dtype, options.wire
    )


def loading_of(source: ModelSource, anatomy: Anatomy) -> Loading:
    """The way in which the weights of this very checkpoint are loaded."""
    if source.random_weights:
        return "in place"
    if source.is_local and not can_be_converted(weight_files(source)):
        return "as a whole"
    return anatomy.loads


def unreadable_rows(source: ModelSource, anatomy: Anatomy) -> str:
    """Why rows of tables cannot be read from the files of this checkpoint one by one; empty where they can, or its
    files are not here yet."""
    if source.random_weights:
        return "random weights lie in no file"
    if source.facts is None:
        return ""
    lost = [table.tensor for table in anatomy.tables if table.tensor not in source.facts.rows]
    return f"{lost[0]} does not lie in safetensors files as it is" if lost else ""


def _refuse_idle(options: RunOptions, engine: str, world: World, device: str, anatomy: Anatomy) -> None:
    """Refuse options that would mean nothing on this device, with this engine, for this model."""
    if device == "cpu" and (idle := options.asked("gpu_memory", "pin_memory")):
        raise UsageError(f"{', '.join(idle)} has no effect: this run computes on the CPU", hint="drop it")
    refuse_idle(options)
    refuse_beside_model(options, engine, world.size, len(anatomy.blocks), regroups=anatomy.is_paged)
    if options.fetch == "partitioned" and world.local_size != world.size:
        raise UsageError("--fetch partitioned needs all ranks on one node", hint="--fetch replicated")


def _read_zero_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--zero-config {path}: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"--zero-config {path} holds no JSON object")
    return config


def _offload_of(config: dict[str, Any]) -> tuple[Offload, tuple[Path, ...]]:
    """The offload target and the folders of a user's JSON."""
    zero = config.get("zero_optimization")
    section = (zero.get("offload_param") if isinstance(zero, dict) else None) or {}
    device, path = section.get("device", "none"), section.get("nvme_path")
    if device not in ("none", "cpu", "nvme"):
        raise UsageError(f"zero_optimization.offload_param.device is {device!r}: none, cpu and nvme are known")
    if device == "nvme" and not path:
        raise UsageError("zero_optimization.offload_param has device nvme, but no nvme_path")
    return device, (Path(path),) if path else ()


def packed_on(anatomy: Anatomy, device: str) -> Anatomy:
    """`anatomy` with what keeps forwards from being packed on `device`, if not the model itself."""
    if device != "cuda":
        return anatomy
    return replace(anatomy, padded_because=anatomy.padded_because or why_no_kernels())
