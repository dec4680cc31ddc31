"""Builds the DeepSpeed JSON for ZeRO-3 inference: every number follows from the model's real shapes.

DeepSpeed counts in elements, not bytes, and its defaults fit no model in particular. The use that its source makes of
each number (0.19.8; paths are below `deepspeed/runtime`) decides the rule here:

`stage3_prefetch_bucket_size`: two blocks. The coordinator gathers parameters ahead of use until this many elements are
    in flight (`zero/partitioned_param_coordinator.py`, `_fetch_sub_module_impl`).
`stage3_max_live_parameters`: the largest module outside the blocks + the block that runs + the prefetch. The same
    function prefetches no more than this less what is live: a number below one large weight stops all prefetch.
`stage3_max_reuse_distance`: 0. A pass uses a weight once; one kept for reuse takes the room of a prefetch.
`stage3_param_persistence_threshold`: the largest vector. Norms and biases, and whatever is no larger, stay on the GPU:
    each is some KiB, and fetching one costs as many calls as fetching a matrix.
`stage3_model_persistence_threshold`: the sum of just those, times the ranks, since `zero/partition_parameters.py`
    (`_update_persist_config`) divides it by them. It bounds what stays.
`offload_param.buffer_size`: the largest *partition*, the part of the largest parameter that one rank holds. The swapper
    refuses a larger one (`swap_tensor/partitioned_param_swapper.py`, `get_buffer`).
`offload_param.buffer_count`: the widest fetch + two blocks of read-ahead, fewer where the pool would grow past
    `NVME_POOL_TARGET_BYTES`. A fetch that finds fewer free buffers than it needs fails (`swap_in`, same file).
`aio`: the plan's settings. The key for threads is `intra_op_parallelism`; `thread_count` is never read
    (`swap_tensor/aio_config.py`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from zeroinf.errors import UsageError
from zeroinf.model.anatomy import TensorSpec
from zeroinf.model.dtypes import DTYPE_BYTES
from zeroinf.planner.plan import AioSettings, Plan
from zeroinf.planner.wire import Wire

PREFETCH_BLOCKS = 2
"""Blocks gathered ahead of use. Llama-2-13B shapes: 84 % of the link, 81 % with less than one matrix (2 x hidden^2)."""

NVME_POOL_TARGET_BYTES = 8 << 30
"""Pinned memory for NVMe reads that all ranks of a machine may take for read-ahead; one fetch may need more."""

AIO_ALIGNED_BYTES = 1024
"""A buffer is a multiple of this for each I/O thread (`AIO_ALIGNED_BYTES` in DeepSpeed's swap_tensor/utils.py)."""

MIN_AIO_BYTES = 1 << 20
"""A partition smaller than this, or than one I/O block, stays in host memory (`MIN_AIO_BYTES`, same file)."""

NEVER_PRINT_STEPS = 10**9

_DTYPE_SECTIONS = {"bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True, kw_only=True, slots=True)
class NvmePool:
    """The pinned buffers through which one rank reads partitions from disk."""

    buffer_size: int
    buffer_count: int
    element_bytes: int

    @property
    def nbytes(self) -> int:
        return self.buffer_count * self.buffer_size * self.element_bytes


def build_zero_config(plan: Plan) -> dict[str, Any]:
    """The DeepSpeed JSON for `plan`, ready for `json.dumps`. The top of this module explains each number."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": plan.batch_size,
        "steps_per_print": NEVER_PRINT_STEPS,
        "wall_clock_breakdown": False,
        "zero_optimization": _zero_section(plan),
    }
    if plan.dtype in _DTYPE_SECTIONS:
        config[_DTYPE_SECTIONS[plan.dtype]] = {"enabled": True}
    if plan.offload == "nvme":
        config["aio"] = {
            "block_size": plan.aio.block_size_bytes,
            "queue_depth": plan.aio.queue_depth,
            "intra_op_parallelism": plan.aio.threads,
            "single_submit": False,
            "overlap_events": True,
        }
    return config


def nvme_pool_bytes(plan: Plan, config: Mapping[str, Any] | None = None) -> int:
    """Bytes that each rank of `plan` locks in memory for NVMe reads: what RLIMIT_MEMLOCK must allow. 0 without NVMe.

    `config` is the user's own JSON where the run uses one.
    """
    if plan.offload != "nvme":
        return 0
    return nvme_pool(plan).nbytes if config is None else _user_pool(config, plan).nbytes


def nvme_pool(plan: Plan) -> NvmePool:
    """The pool of one rank: each buffer holds the largest partition, aligned as the swapper aligns it."""
    element_bytes = DTYPE_BYTES[plan.dtype]
    buffer_size = _aligned(_partition(plan.anatomy.largest_parameter, plan), plan.aio.threads, element_bytes)
    read_ahead = PREFETCH_BLOCKS * max(sum(_swapped(t, plan) for t in b.tensors) for b in plan.anatomy.blocks)
    widest = _widest_fetch(plan)
    affordable = NVME_POOL_TARGET_BYTES // (buffer_size * element_bytes * plan.world_size)
    # One more than a fetch needs, whatever it costs: without it the disk rests while the link copies.
    buffer_count = max(widest + 1, min(widest + read_ahead, affordable))
    return NvmePool(buffer_size=buffer_size, buffer_count=buffer_count, element_bytes=element_bytes)


def check_user_config(config: Mapping[str, Any], plan: Plan) -> None:
    """Refuse a DeepSpeed JSON of the user's that cannot run `plan`, or that holds a setting which nothing would read.

    Where the weights rest is the file's to say: `plan.offload` must come from it. Keys that DeepSpeed refuses by
    itself, naming them, are left to it.

    Raises:
        UsageError: naming the key.
    """
    _refuse_auto(config)
    _refuse_keys_without_effect(config)
    stage = _section(config, "zero_optimization").get("stage", 0)
    if stage != 3:
        raise UsageError(f"zero_optimization.stage is {stage}: only stage 3 partitions weights", hint="set it to 3")
    _check_dtype(config, plan)
    _check_codes(config, plan)
    if plan.offload == "nvme":
        _check_pool(config, plan)


def codes_of(config: Mapping[str, Any]) -> Wire:
    """The wire format of weights with a DeepSpeed JSON that `check_user_config` accepts."""
    bits = own_codes(config).get("num_bits")
    return "model" if bits is None else "int4" if bits == 4 else "int8"


def own_codes(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The section of a DeepSpeed JSON that asks for its own codes; empty where none does."""
    return _section(_section(config, "weight_quantization"), "quantized_initialization")


def _zero_section(plan: Plan) -> dict[str, Any]:
    anatomy = plan.anatomy
    block = max(block.parameters for block in anatomy.blocks)
    prefetch = PREFETCH_BLOCKS * block
    vector = max((t.numel for t in _parameters(anatomy.tensors()) if len(t.shape) <= 1), default=0)
    persistent = sum(t.numel for t in _parameters(anatomy.tensors()) if t.numel <= vector)
    section: dict[str, Any] = {
        "stage": 3,
        "stage3_prefetch_bucket_size": prefetch,
        "stage3_max_live_parameters": _largest_module(anatomy.outside) + block + prefetch,
        "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": vector,
        "stage3_model_persistence_threshold": persistent * plan.world_size,
    }
    if plan.offload != "none":
        section["offload_param"] = _offload_section(plan)
    return section


def _offload_section(plan: Plan) -> dict[str, Any]:
    section: dict[str, Any] = {"device": plan.offload, "pin_memory": plan.pin_memory}
    if plan.offload == "nvme":
        pool = nvme_pool(plan)
        section |= {
            "nvme_path": str(plan.nvme_paths[0]),
            "buffer_count": pool.buffer_count,
            "buffer_size": pool.buffer_size,
        }
    return section


def _parameters(tensors: Iterable[TensorSpec]) -> Iterator[TensorSpec]:
    return (t for t in tensors if not t.is_buffer)


def _owner(name: str) -> str:
    """The module that holds the parameter `name`."""
    return name.rpartition(".")[0]


def _largest_module(tensors: Iterable[TensorSpec]) -> int:
    """Elements of the module with most of its own: what one fetch makes live."""
    elements: Counter[str] = Counter()
    for tensor in _parameters(tensors):
        elements[_owner(tensor.name)] += tensor.numel
    return max(elements.values(), default=0)


def _partition(numel: int, plan: Plan) -> int:
    """Elements that one rank holds of a parameter (`_aligned_size` / world size in DeepSpeed)."""
    return -(-numel // plan.world_size)


def _swapped(tensor: TensorSpec, plan: Plan) -> bool:
    """Whether DeepSpeed puts the partitions of `tensor` on disk (`swappable_tensor`)."""
    nbytes = _partition(tensor.numel, plan) * DTYPE_BYTES[plan.dtype]
    return not tensor.is_buffer and nbytes >= max(MIN_AIO_BYTES, plan.aio.block_size_bytes)


def _widest_fetch(plan: Plan) -> int:
    """Most buffers that must be held at one moment: a module's own parameters, and those of the modules around it."""
    held = Counter(_owner(t.name) for t in plan.anatomy.tensors() if _swapped(t, plan))
    return max((sum(held[module] for module in _with_enclosing(owner)) for owner in held), default=0)


def _with_enclosing(module: str) -> Iterator[str]:
    """`module`, and each module that it lies in, up to the root (the empty name)."""
    while module:
        yield module
        module = _owner(module)
    yield ""


def _aligned(numel: int, threads: int, element_bytes: int) -> int:
    """`numel` rounded up so that each I/O thread gets an aligned part (`_io_aligned_numel`)."""
    alignment = AIO_ALIGNED_BYTES * threads // element_bytes
    return -(-numel // alignment) * alignment


# What follows checks a JSON that the user wrote.

_TOP_LEVEL_KEYS = frozenset(
    {
        "zero_optimization",
        "bf16",
        "fp16",
        "aio",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "steps_per_print",
        "wall_clock_breakdown",
        "comms_logger",
        "weight_quantization",
        "dump_state",
        "log_level",
        "memory_breakdown",
    }
)
"""Keys with an effect on inference, or that DeepSpeed cannot start without. It ignores unknown ones in silence."""

_CODES = {"num_bits": (4, 8), "group_dim": (0, 1), "symmetric": (False,)}
"""What DeepSpeed's quantizer can do (its inference/quantization/utils.py)."""

_AIO_KEYS = frozenset(
    {"block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"}
)
_NVME_ONLY_KEYS = ("nvme_path", "buffer_count", "buffer_size")
_DEFAULT_POOL = {"buffer_count": 5, "buffer_size": 10**8}
_DEFAULT_AIO = {"block_size": 1 << 20, "queue_depth": 8, "intra_op_parallelism": 1}
"""What DeepSpeed takes when the file says nothing (its zero/offload_config.py and swap_tensor/constants.py)."""

_TRAINING_ZERO_KEYS = ("offload_optimizer", "cpu_offload", "cpu_offload_use_pin_memory", "zenflow")


def _section(parent: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = parent.get(key)
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise UsageError(f"{key} is {section!r}: an object is needed")
    return section


def _refuse_auto(value: Any, path: str = "") -> None:
    if value == "auto":
        raise UsageError(
            f"{path} is 'auto': only transformers' Trainer fills that in, and DeepSpeed would take its default",
            hint="`zeroinf config` prints the numbers that follow from the model",
        )
    if isinstance(value, Mapping):
        for key, child in value.items():
            _refuse_auto(child, f"{path}.{key}" if path else str(key))


def _refuse_keys_without_effect(config: Mapping[str, Any]) -> None:
    for key in config:
        if key not in _TOP_LEVEL_KEYS:
            raise UsageError(
                f"{key} has no effect on inference",
                hint=f"remove it; these are read: {', '.join(sorted(_TOP_LEVEL_KEYS))}",
            )
    zero = _section(config, "zero_optimization")
    for key in _TRAINING_ZERO_KEYS:
        if key in zero:
            raise UsageError(f"zero_optimization.{key} has no effect on inference", hint="remove it")
    offload = _section(zero, "offload_param")
    if "max_in_cpu" in offload:
        raise UsageError("zero_optimization.offload_param.max_in_cpu is ignored by DeepSpeed", hint="remove it")
    aio = _section(config, "aio")
    if "thread_count" in aio:
        raise UsageError("aio.thread_count is ignored by DeepSpeed", hint="the key is aio.intra_op_parallelism")
    for key in aio:
        if key not in _AIO_KEYS:
            raise UsageError(
                f"aio.{key} is ignored by DeepSpeed", hint=f"these are read: {', '.join(sorted(_AIO_KEYS))}"
            )
    if offload.get("device", "none") != "nvme":
        if aio:
            raise UsageError("aio has no effect unless zero_optimization.offload_param.device is nvme")
        for key in _NVME_ONLY_KEYS:
            if key in offload:
                raise UsageError(f"zero_optimization.offload_param.{key} has no effect unless its device is nvme")


def _check_dtype(config: Mapping[str, Any], plan: Plan) -> None:
    """The sections decide the dtype of partitions: one that differs from the model's would be converted in silence."""
    for dtype, key in _DTYPE_SECTIONS.items():
        enabled = bool(_section(config, key).get("enabled", False))
        if enabled != (plan.dtype == dtype):
            raise UsageError(
                f"{key}.enabled is {str(enabled).lower()}, but the model runs in {plan.dtype}",
                hint="make the file and --dtype agree",
            )


def _check_codes(config: Mapping[str, Any], plan: Plan) -> None:
    """DeepSpeed's own codes of 4 or 8 bits: it asserts what it cannot do once it has begun to load."""
    where = "weight_quantization.quantized_initialization"
    section = _section(config, "weight_quantization")
    for key in section:
        if key != "quantized_initialization":
            raise UsageError(f"weight_quantization.{key} has no effect here", hint=f"weights are coded by {where}")
    codes = own_codes(config)
    if not codes:
        return
    if plan.offload == "nvme":
        raise UsageError(f"{where} has not been tried with offload_param.device nvme", hint="cpu will do")
    for key, allowed in _CODES.items():
        if codes.get(key) not in allowed:
            words = " or ".join(json.dumps(value) for value in allowed)
            raise UsageError(f"{where}.{key} is {json.dumps(codes.get(key))}", hint=f"DeepSpeed can do {words}")
    group, dimension = codes.get("group_size"), codes["group_dim"]
    if not isinstance(group, int) or group < 1:
        raise UsageError(f"{where}.group_size is {json.dumps(group)}", hint="a number of weights, such as 64")
    for tensor in _parameters(plan.anatomy.tensors()):
        if len(tensor.shape) == 2 and tensor.shape[dimension] % group:
            raise UsageError(
                f"{where}.group_size is {group}, which does not divide {tensor.name} with its shape {tensor.shape}",
                hint="choose one that divides each",
            )


def _check_pool(config: Mapping[str, Any], plan: Plan) -> None:
    pool = _user_pool(config, plan)
    plan = replace(plan, aio=_user_aio(config))
    largest, widest = _partition(plan.anatomy.largest_parameter, plan), _widest_fetch(plan)
    if pool.buffer_size < largest:
        raise UsageError(
            f"zero_optimization.offload_param.buffer_size is {pool.buffer_size} elements, "
            f"but a rank's part of the largest parameter has {largest}",
            hint=f"set it to {nvme_pool(plan).buffer_size}",
        )
    if pool.buffer_count < widest:
        raise UsageError(
            f"zero_optimization.offload_param.buffer_count is {pool.buffer_count}, "
            f"but {widest} parameters must be read at once",
            hint=f"set it to {nvme_pool(plan).buffer_count}",
        )


def _user_aio(config: Mapping[str, Any]) -> AioSettings:
    aio = {**_DEFAULT_AIO, **_section(config, "aio")}
    return AioSettings(
        block_size_bytes=aio["block_size"], queue_depth=aio["queue_depth"], threads=aio["intra_op_parallelism"]
    )


def _user_pool(config: Mapping[str, Any], plan: Plan) -> NvmePool:
    offload = {**_DEFAULT_POOL, **_section(_section(config, "zero_optimization"), "offload_param")}
    element_bytes = DTYPE_BYTES[plan.dtype]
    return NvmePool(
        buffer_size=_aligned(int(offload["buffer_size"]), _user_aio(config).threads, element_bytes),
        buffer_count=int(offload["buffer_count"]),
        element_bytes=element_bytes,
    )
