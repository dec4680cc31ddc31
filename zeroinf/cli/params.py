"""Defines value types and groups of options that several commands share."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from zeroinf.cli.environment import option
from zeroinf.errors import UsageError
from zeroinf.planner.plan import AioSettings, TensorParallel
from zeroinf.planner.traits import ENGINE_NAMES
from zeroinf.sizes import parse_size

_Command = TypeVar("_Command", bound=Callable[..., Any])

_AIO = AioSettings()
AIO_OPTIONS = ("aio_block_size", "aio_queue_depth", "aio_threads")

# O_DIRECT reads whole device sectors, which are 512 or 4096 bytes.
_DIRECT_IO_BYTES = 4096


class SizeType(click.ParamType):  # type: ignore[type-arg]  # older releases of click have it without one
    """A size as `24GiB` (binary), `24GB` (decimal) or plain bytes, converted to bytes."""

    name = "size"

    def __init__(self, *, multiple_of: int = 1) -> None:
        self.multiple_of = multiple_of

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes of `value`; a usage error names what is wrong with it."""
        if isinstance(value, int):
            return value
        try:
            return parse_size(value, multiple_of=self.multiple_of)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class JsonObjectType(click.ParamType):  # type: ignore[type-arg]
    """A JSON object, converted to a dict."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        """The object; a usage error says what is wrong with it."""
        if isinstance(value, dict):
            return value
        try:
            found = json.loads(value)
        except ValueError as error:
            self.fail(f"{value!r} is no JSON: {error}", param, ctx)
        if not isinstance(found, dict):
            self.fail(f"{value!r} is no JSON object", param, ctx)
        return found


class FiniteFloat(click.FloatRange):
    """A number within bounds; `nan` and infinities, which Python reads as numbers and which no bound stops, are not."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """`value` as a number; a usage error says why it is none."""
        number = float(super().convert(value, param, ctx))
        if not isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


def model_options(command: _Command, *, required: bool = True) -> _Command:
    """Which model: `model`, `revision`, `dtype` and `trust_remote_code`."""
    return _add(
        command,
        option(
            "-m",
            "--model",
            required=required,
            help="Hub id, local folder, .gguf file or `demo`; where only shapes matter, also a name of configs/models.",
        ),
        option("--revision", help="Branch, tag or commit on the hub."),
        option(
            "--dtype",
            type=click.Choice(["auto", "bfloat16", "float16", "float32", "int8"]),
            default="auto",
            show_default=True,
            help="Type of the weights and of the arithmetic; auto takes the model's own.",
        ),
        option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model."),
    )


class InjectionPolicyType(click.ParamType):  # type: ignore[type-arg]
    """`Block=attention.output,mlp.output`: a class of blocks and the layers whose results are summed."""

    name = "Block=layer,layer"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, tuple[str, ...]]:
        """The class's name and the layers'."""
        block, _, layers = str(value).partition("=")
        names = tuple(filter(None, layers.split(",")))
        if not block or not names:
            self.fail(f"{value!r}: write LlamaDecoderLayer=self_attn.o_proj,mlp.down_proj", param, ctx)
        return block, names


_PARALLEL_OPTIONS = ("tensor_parallel_size", "injection_policy", "checkpoint_json", "save_mp_checkpoint_path")


def tensor_parallel_options(command: _Command) -> _Command:
    """How DeepSpeed-Inference splits a model: what `tensor_parallel_of` takes."""
    return _add(
        command,
        option(
            "-tp",
            "--tensor-parallel-size",
            type=click.IntRange(min=1),
            help="Ranks that hold one model together. With --engine tensor-parallel. [default: all]",
        ),
        option(
            "--injection-policy",
            type=InjectionPolicyType(),
            multiple=True,
            help="Block=attention.output,mlp.output: the layers whose results are summed, for models that DeepSpeed "
            "does not know. With --engine tensor-parallel.",
        ),
        option("--kernel-inject", is_flag=True, help="DeepSpeed's fused layers: refused, they need transformers 4."),
        option(
            "--checkpoint-json",
            type=click.Path(path_type=Path, exists=True, dir_okay=False),
            help="Weights listed in DeepSpeed's format (BLOOM, ds_model, Megatron), saved by any number of ranks. With "
            "--engine tensor-parallel.",
        ),
        option(
            "--save-mp-checkpoint-path",
            type=click.Path(path_type=Path, file_okay=False),
            help="Save each rank's part of the weights and ds_inference_config.json there. With --engine "
            "tensor-parallel.",
        ),
    )


def tensor_parallel_of(asked: dict[str, Any]) -> TensorParallel:
    """Take what `tensor_parallel_options` asked for out of `asked`. Raises UsageError for kernel injection."""
    if asked.pop("kernel_inject"):
        raise UsageError(
            "--kernel-inject: DeepSpeed's fused layers do not run under transformers 5: BLOOM's and GPT-NeoX's cannot "
            "be made, others answer with tuples or leave the KV cache empty (docs/decisions/0012-baselines.md)",
            hint="drop it: --engine tensor-parallel splits the model without them",
        )
    size, policy, checkpoint, save_to = (asked.pop(name) for name in _PARALLEL_OPTIONS)
    return TensorParallel(size=size or 0, injection_policy=policy, checkpoint=checkpoint, save_to=save_to)


class AutoIntType(click.ParamType):  # type: ignore[type-arg]
    """A whole number, or `auto`, which is None and leaves it to the planner."""

    name = "integer|auto"

    def __init__(self, *, minimum: int) -> None:
        self.minimum = minimum

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """The number, None for `auto`; a usage error for all else."""
        if value == "auto":
            return None
        number = int(value) if str(value).isdecimal() else -1
        if number < self.minimum:
            self.fail(f"{value!r} is neither `auto` nor a whole number from {self.minimum} on", param, ctx)
        return number


def wire_option(command: _Command) -> _Command:
    """How weights cross the link: `wire`."""
    return option(
        "--wire",
        type=click.Choice(["model", "int8", "int4"]),
        default="model",
        show_default=True,
        help="How weights of layers are stored and transferred: in the model's dtype, or packed as int8 or int4, which "
        "is lossy: `zeroinf eval` measures how much. With the stream engine.",
    )(command)


def engine_options(command: _Command) -> _Command:
    """What runs the model and how, from `engine` to `micro_batch_rows`."""
    return _add(
        command,
        option(
            "--engine",
            type=click.Choice(["auto", *ENGINE_NAMES]),
            default="auto",
            show_default=True,
            help="stream is ours, zero is DeepSpeed's ZeRO-3; resident (the whole model on each GPU), accelerate and "
            "tensor-parallel (DeepSpeed-Inference) are for comparison. auto takes stream wherever it can run the "
            "request.",
        ),
        option(
            "--fetch",
            type=click.Choice(["auto", "replicated", "partitioned"]),
            default="auto",
            show_default=True,
            help="With several GPUs and the stream engine: each pulls all weights over its own link, or its part of "
            "them, gathered between GPUs. auto takes what is faster; only GPUs that reach each other are partitioned.",
        ),
        wire_option,
        option(
            "--kv",
            type=click.Choice(["auto", "gpu", "host"]),
            default="auto",
            show_default=True,
            help="Where the KV cache is: on the GPU, or in host memory, from which it is transferred layer by layer; "
            "auto takes host memory for as many sequences as make more tokens/s. With the stream engine.",
        ),
        option(
            "--kv-dtype",
            type=click.Choice(["model", "int8"]),
            default="model",
            show_default=True,
            help="The KV cache in host memory: in the model's dtype, or quantized to int8, which is lossy.",
        ),
        option(
            "--resident-blocks",
            type=AutoIntType(minimum=0),
            default="auto",
            show_default=True,
            help="Layers that never leave the GPU; the others stream. With the stream engine and accelerate.",
        ),
        option(
            "-b",
            "--batch-size",
            type=AutoIntType(minimum=1),
            default="auto",
            show_default=True,
            help="Sequences that run at once on each GPU; auto takes what gives most tokens/s without running out of "
            "memory.",
        ),
        option(
            "--micro-batch-rows",
            type=AutoIntType(minimum=1),
            default="auto",
            show_default=True,
            help="Most sequences that run one forward together; several such micro-batches of equal size share a "
            "pass over the weights. With the stream engine.",
        ),
    )


def rest_options(command: _Command, *, auto: bool = True) -> _Command:
    """Where weights rest: `offload` and `nvme_paths`."""
    return _add(
        command,
        option(
            "--offload",
            type=click.Choice(["auto", "none", "cpu", "nvme"] if auto else ["none", "cpu", "nvme"]),
            default="auto" if auto else "cpu",
            show_default=True,
            help="Where weights rest: on the GPUs, in host memory, or in files below --nvme-path"
            + ("; auto takes the fastest that fits." if auto else "."),
        ),
        option(
            "--nvme-path",
            "nvme_paths",
            type=click.Path(path_type=Path),
            multiple=True,
            help="Folder on a fast local disk. With --offload nvme; weights are striped over several.",
        ),
    )


def offload_options(command: _Command, *, auto: bool = False) -> _Command:
    """Where weights rest: `offload`, `nvme_paths`, `pin_memory` and the three `aio_` settings."""
    return _add(
        command,
        lambda command: rest_options(command, auto=auto),
        option(
            "--pin-memory/--no-pin-memory",
            default=True,
            show_default=True,
            help="Keep host weights page-locked: full link speed, but they cannot be swapped out.",
        ),
        option(
            "--aio-block-size",
            type=SizeType(multiple_of=_DIRECT_IO_BYTES),
            default=f"{_AIO.block_size_bytes >> 20}MiB",
            show_default=True,
            help="Bytes of one disk request; smaller weights stay in host memory. With --engine zero --offload nvme.",
        ),
        option(
            "--aio-queue-depth",
            type=click.IntRange(min=1),
            default=_AIO.queue_depth,
            show_default=True,
            help="Disk requests in flight for each thread. With --engine zero --offload nvme.",
        ),
        option(
            "--aio-threads",
            type=click.IntRange(min=1),
            default=_AIO.threads,
            show_default=True,
            help="Threads that share the reading of one weight. With --engine zero --offload nvme.",
        ),
    )


def given(ctx: click.Context, *names: str) -> list[str]:
    """Those of the parameters `names` that the user set for this command, by a flag or in the environment."""
    explicit = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    return [name for name in names if ctx.get_parameter_source(name) in explicit]


def given_flags(ctx: click.Context, *names: str) -> list[str]:
    """The same as the long flags that users write."""
    return [f"--{name.replace('_', '-')}" for name in given(ctx, *names)]


def refuse_group_options(ctx: click.Context) -> None:
    """Refuse flags that stand between a group and the command below it, for which they would mean nothing.

    Raises:
        UsageError: naming the flags.
    """
    named = [name for name in ctx.params if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if named:
        raise UsageError(
            f"{flags(ctx, named)} means nothing before `{ctx.invoked_subcommand}`", hint="write it behind, or drop it"
        )


def aio_of(asked: dict[str, Any]) -> AioSettings:
    """Take DeepSpeed's disk settings out of `asked`."""
    return AioSettings(
        block_size_bytes=asked.pop("aio_block_size"),
        queue_depth=asked.pop("aio_queue_depth"),
        threads=asked.pop("aio_threads"),
    )


def refuse_unused_offload_options(ctx: click.Context, *, engine: str | None = None) -> None:
    """Refuse offload options that would have no effect with `engine` (default: the one asked for, or DeepSpeed's), and
    NVMe offload without a folder.

    Raises:
        UsageError: naming the options.
    """
    offload, engine = ctx.params["offload"], engine or ctx.params.get("engine", "zero")
    elsewhere = ctx.params.get("machine_name") or ctx.params.get("nvme_space")  # a disk that is planned for
    if offload == "nvme" and not ctx.params["nvme_paths"] and not elsewhere:
        raise UsageError("--offload nvme needs --nvme-path", hint="name a folder on a fast local disk")
    nvme_only = () if offload in ("nvme", "auto") else ("nvme_paths", *AIO_OPTIONS)
    if unused := given(ctx, *nvme_only):
        raise UsageError(
            f"{flags(ctx, unused)} has no effect with --offload {offload}", hint="add --offload nvme, or drop it"
        )
    if engine != "zero" and (unused := given(ctx, *AIO_OPTIONS)):
        raise UsageError(f"{flags(ctx, unused)} configures DeepSpeed's disk I/O", hint="add --engine zero, or drop it")
    if engine in ("zero", "accelerate") and len(ctx.params["nvme_paths"]) > 1:
        raise UsageError(f"the {engine} engine uses one --nvme-path", hint="--engine stream, or name one folder")
    if engine in ("resident", "tensor-parallel") and (unused := given(ctx, "nvme_paths", "pin_memory")):
        raise UsageError(f"{flags(ctx, unused)} has no effect with the {engine} engine", hint="drop it")
    if engine == "accelerate" and (unused := given(ctx, "pin_memory")):
        raise UsageError(f"{flags(ctx, unused)} has no effect: accelerate locks no pages", hint="drop it")
    if offload == "none" and given(ctx, "pin_memory"):
        raise UsageError(
            f"{flags(ctx, ['pin_memory'])} has no effect with --offload none", hint="add --offload cpu, or drop it"
        )


def flags(ctx: click.Context, names: list[str]) -> str:
    """The parameters `names` as the user writes them."""
    return ", ".join("/".join(p.opts + p.secondary_opts) for p in ctx.command.params if p.name in names)


def _add(command: _Command, *options: Callable[[_Command], _Command]) -> _Command:
    """Decorate `command` so that its help shows `options` in the order written."""
    for decorate in reversed(options):
        command = decorate(command)
    return command
