"""All that can be settled before weights are loaded: input, output, model, plan, and whether this machine can do it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from zeroinf.distributed.world import World
from zeroinf.engines.stream.stored import check_room
from zeroinf.engines.zero.config import build_zero_config, check_user_config, nvme_pool_bytes
from zeroinf.errors import DoesNotFitError, InputError, UsageError
from zeroinf.generation.row import Sampling
from zeroinf.hardware.aio_op import read_aio_op
from zeroinf.hardware.checks import check_aio_op, check_memlock, gib, require
from zeroinf.hardware.disk import read_disk
from zeroinf.hardware.machine import Disk
from zeroinf.hardware.snapshot import read_memory
from zeroinf.jobs.options import RunOptions
from zeroinf.jobs.output import check_output
from zeroinf.jobs.readers import read_requests
from zeroinf.jobs.requests import Refusal, Request
from zeroinf.jobs.text import TextCodec
from zeroinf.model.inspect import read_anatomy
from zeroinf.model.source import ModelSource, load_tokenizer, pick_dtype
from zeroinf.planner.choice import Fetch, Offload
from zeroinf.planner.plan import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One request, ready for a row."""

    index: int
    id: str
    text: str | None
    prompt: tuple[int, ...]
    sampling: Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What rank 0 settles and every rank is told."""

    plan: Plan
    engine_choice: str | None
    """Why `auto` did not take the default engine, if it did not."""
    zero_config: dict[str, Any]
    work: tuple[Work, ...]
    refusals: tuple[Refusal, ...]
    tokenize_s: float


def prepare(options: RunOptions, source: ModelSource, world: World, device: str) -> Prepared:
    """Check everything, cheap things first. Raises the error of whatever does not hold."""
    if options.output_file is not None:
        check_output(options.output_file, options.overwrite)
    requests, refusals = _read(options)
    tokenizer = load_tokenizer(source)
    anatomy = read_anatomy(
        source.config,
        dtype=pick_dtype(options.dtype, source, device),
        trust_remote_code=options.trust_remote_code,
    )
    started = time.perf_counter()
    work, too_long = _tokenize(requests, TextCodec(tokenizer, anatomy.vocabulary), anatomy.context_limit)
    tokenize_s = time.perf_counter() - started
    if not work:
        raise InputError(
            f"none of the {len(refusals) + len(too_long)} requests can be run: {(refusals + too_long)[0].reason}"
        )
    _refuse_idle_sampling_flags(options, work)
    own_config = None if options.zero_config is None else _read_zero_config(options.zero_config)
    offload, nvme_paths = (options.offload, options.nvme_paths) if own_config is None else _offload_of(own_config)
    engine, why = choose_engine(options.engine, own_zero_config=own_config is not None)
    plan = Plan(
        anatomy=anatomy,
        engine=engine,
        offload=offload,
        dtype=anatomy.dtype,
        device="cuda" if device == "cuda" else "cpu",
        world_size=world.size,
        # An equal share for each rank, where there are too few requests to fill every batch.
        batch_size=min(options.batch_size, -(-len(work) // world.size)),
        fetch=choose_fetch(
            options.fetch, engine, offload, world, gpus_are_linked=device == "cuda" and _gpus_are_linked()
        ),
        prompt_tokens=max(len(item.prompt) for item in work),
        new_tokens=max(item.sampling.max_new_tokens for item in work),
        resident_blocks=len(anatomy.blocks) if offload == "none" else 0,
        nvme_blocks=len(anatomy.blocks) if offload == "nvme" else 0,
        nvme_paths=nvme_paths,
        pin_memory=options.pin_memory,
        aio=options.aio,
    )
    if own_config is not None:
        check_user_config(own_config, plan)
    if plan.offload == "nvme":
        _check_nvme(plan, source, own_config)
    if plan.offload == "cpu":
        _check_host_memory(plan)
    return Prepared(
        plan=plan,
        engine_choice=why,
        zero_config=own_config or build_zero_config(plan),
        work=work,
        refusals=tuple(refusals + too_long),
        tokenize_s=tokenize_s,
    )


def _read(options: RunOptions) -> tuple[list[Request], list[Refusal]]:
    name = options.input_file
    try:
        stream: Any = nullcontext() if name is None else nullcontext(sys.stdin.buffer) if name == "-" else _open(name)
        with stream as source:
            label = "<stdin>" if name == "-" else name or "--prompt"
            return read_requests(
                options.prompts, source, options.sampling, input_format=options.input_format, name=label
            )
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from error


def _open(name: str) -> BinaryIO:
    return Path(name).open("rb")


def _tokenize(
    requests: Sequence[Request], codec: TextCodec, context_limit: int | None
) -> tuple[tuple[Work, ...], list[Refusal]]:
    work, refusals = [], []
    for request in requests:
        try:
            prompt = codec.encode(request)
            _check_length(len(prompt), request.sampling.max_new_tokens, context_limit)
        except ValueError as error:
            refusals.append(Refusal(index=request.index, line=request.line, id=request.id, reason=str(error)))
            continue
        work.append(
            Work(
                index=request.index,
                id=request.id,
                text=request.prompt,
                prompt=tuple(prompt),
                sampling=request.sampling,
            )
        )
    return tuple(work), refusals


def _check_length(prompt_tokens: int, new_tokens: int, context_limit: int | None) -> None:
    if context_limit is not None and prompt_tokens + new_tokens > context_limit:
        raise ValueError(
            f"the prompt has {prompt_tokens} tokens and max_new_tokens is {new_tokens}, "
            f"but the model's context holds {context_limit}"
        )


def _refuse_idle_sampling_flags(options: RunOptions, work: Sequence[Work]) -> None:
    if options.sampling_only and all(item.sampling.is_greedy for item in work):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in options.sampling_only)
        raise UsageError(f"{flags} would change nothing: every request is greedy", hint="add --temperature, or drop it")


def _read_zero_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"--zero-config {path}: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"--zero-config {path} holds no JSON object")
    return config


def _offload_of(config: dict[str, Any]) -> tuple[Offload, tuple[Path, ...]]:
    """Where a user's JSON lets parameters rest."""
    zero = config.get("zero_optimization")
    section = (zero.get("offload_param") if isinstance(zero, dict) else None) or {}
    device, path = section.get("device", "none"), section.get("nvme_path")
    if device not in ("none", "cpu", "nvme"):
        raise UsageError(f"zero_optimization.offload_param.device is {device!r}: none, cpu and nvme are known")
    if device == "nvme" and not path:
        raise UsageError("zero_optimization.offload_param has device nvme, but no nvme_path")
    return device, (Path(path),) if path else ()


def choose_engine(asked: str, *, own_zero_config: bool) -> tuple[str, str | None]:
    """The engine's name, and why `auto` did not take the stream engine.

    Raises UsageError when the stream engine is asked for what it does not do.
    """
    obstacle = "--zero-config configures DeepSpeed" if own_zero_config else None
    if asked == "stream" and obstacle:
        raise UsageError(f"--engine stream: {obstacle}", hint="--engine zero, or --engine auto")
    if asked == "auto":
        return ("zero", obstacle) if obstacle else ("stream", None)
    return asked, None


def choose_fetch(asked: str, engine: str, offload: Offload, world: World, *, gpus_are_linked: bool) -> Fetch:
    """How the stream engine's ranks use their links.

    `auto` partitions on one node where GPUs reach each other, and where weights come from a disk, which then reads each
    of them once. Raises UsageError where --fetch would mean nothing.
    """
    one_node = world.local_size == world.size
    idle = {
        f"with the {engine} engine": engine != "stream",
        "with --offload none": offload == "none",
        "with one rank": world.size == 1,
    }
    why = next((reason for reason, holds in idle.items() if holds), None)
    if asked != "auto" and why is not None:
        raise UsageError(f"--fetch {asked} has no effect {why}", hint="drop it")
    if asked == "partitioned" and not one_node:
        raise UsageError("--fetch partitioned needs all ranks on one node", hint="--fetch replicated")
    worthwhile = why is None and one_node and (gpus_are_linked or offload == "nvme")
    return "partitioned" if asked == "partitioned" or (asked == "auto" and worthwhile) else "replicated"


def _gpus_are_linked() -> bool:
    """Whether GPU 0 can read the memory of every other one directly."""
    import torch

    return all(torch.cuda.can_device_access_peer(0, other) for other in range(1, torch.cuda.device_count()))


def _check_host_memory(plan: Plan) -> None:
    """All ranks together keep the weights in host memory once, whichever engine runs them."""
    available = read_memory().available_bytes
    if available < plan.anatomy.weight_bytes:
        raise DoesNotFitError(
            f"the weights take {gib(plan.anatomy.weight_bytes)}, but {gib(available)} of host memory are available",
            hint="free memory, or --offload nvme --nvme-path DIR",
        )


def _check_nvme(plan: Plan, source: ModelSource, own_config: dict[str, Any] | None) -> None:
    """The folders, their room, and what the engine needs beside them."""
    disks = [read_disk(path) for path in plan.nvme_paths]
    for disk in disks:
        if not disk.exists:
            raise UsageError(f"--nvme-path {disk.path} is not a folder", hint=f"mkdir -p {disk.path}")
        if not disk.writable:
            raise UsageError(f"--nvme-path {disk.path} is not writable", hint="choose another folder")
    if len({disk.path.resolve() for disk in disks}) < len(disks):
        raise UsageError("--nvme-path names the same folder twice", hint="name each disk's folder once")
    if plan.engine == "stream":
        check_room(plan, source)
    else:
        _check_deepspeed_nvme(plan, disks[0], own_config)


def _check_deepspeed_nvme(plan: Plan, disk: Disk, own_config: dict[str, Any] | None) -> None:
    """What DeepSpeed's NVMe offload needs, before it fails in its own way: late, or by SIGABRT."""
    if disk.free_bytes < plan.anatomy.weight_bytes:
        raise DoesNotFitError(
            f"the weights take {gib(plan.anatomy.weight_bytes)}, but {disk.path} has {gib(disk.free_bytes)} free",
            hint="make room there, choose another folder, or --offload cpu",
        )
    require(
        [
            *check_aio_op(read_aio_op(with_gpu=plan.device == "cuda"), asked=True),
            check_memlock(read_memory(), asked=True, needed_bytes=nvme_pool_bytes(plan, own_config)),
        ]
    )
