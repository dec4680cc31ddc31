"""Machines, a model and its workloads made of round numbers, for tests of the planner alone."""

from __future__ import annotations

from typing import Any

import zeroinf.engines.registry  # noqa: F401  (hands the engines to the planner)
from zeroinf.hardware.machine import Gpu, Machine, Memory
from zeroinf.model.anatomy import Anatomy, Block, TensorSpec
from zeroinf.model.cache_layout import LayerCache, TokenState
from zeroinf.planner.allocator import Event
from zeroinf.planner.figures import fitted_figures
from zeroinf.planner.memory import Overhead
from zeroinf.planner.timing import Speeds
from zeroinf.planner.workload import Kernel, Kernels, Lengths, Shape, Step, Workload

MIB, GIB = 1 << 20, 1 << 30
PROMPT, NEW = 64, 16


def _chain(blocks: int = 12, width: int = 4096) -> Anatomy:
    """Blocks of one matrix (32 MiB) and one vector each, embeddings of 64 MiB outside."""

    def tensor(name: str, *shape: int) -> TensorSpec:
        return TensorSpec(name=name, shape=shape, dtype="bfloat16")

    state = TokenState(heads=8, width=128, dtype="bfloat16")
    layer = LayerCache(fixed_bytes=0, bytes_per_token=2 * state.nbytes, keys=state, values=state)
    return Anatomy(
        architecture="Chain",
        dtype="bfloat16",
        blocks_path="blocks",
        blocks=tuple(
            Block(index=i, tensors=(tensor(f"blocks.{i}.matrix", width, width), tensor(f"blocks.{i}.vector", width)))
            for i in range(blocks)
        ),
        outside=(tensor("embeddings", 2 * width, width),),
        tied=(),
        cache=(layer,) * blocks,
        hidden_size=width,
        vocabulary=2 * width,
        context_limit=None,
    )


CHAIN = _chain()


def lengths_of(prompt: int = PROMPT, new: int = NEW) -> Lengths:
    return Lengths(prompt_tokens=prompt, new_tokens=new)


def pool_bytes(rows: int, prompt: int = PROMPT, new: int = NEW) -> int:
    """Bytes of a pool for `rows` rows of these lengths."""
    return CHAIN.pool_bytes(lengths_of(prompt, new).pool(CHAIN, rows))


def shape_of(rows: int, micro_batch_rows: int | None = None, prefill_tokens: int = 1 << 30) -> Shape:
    return Shape(rows, min(rows, micro_batch_rows or rows), prefill_tokens)


def workload_of(shape: Shape, *, prompt: int = PROMPT, new: int = NEW) -> Workload:
    """Passes whose memory and work are straight lines in rows and lengths."""

    def step(rows: int, tokens: int) -> Step:
        # The inputs stay for the pass, others come and go.
        wide = 4 * CHAIN.hidden_size * rows * tokens
        passing = (Event(2, wide), Event(3, 2 * wide), Event(2), Event(3))
        matrix = CHAIN.hidden_size**2
        kernel = Kernel(2 * rows * tokens * matrix, 2 * matrix + 2 * wide)
        return Step(
            inputs=(Event(1, 8 * rows * (prompt + new)),),
            sections=(passing,),
            end=(Event(1),),
            choice=(),
            kernels=(Kernels(1.0, (Kernel(0, wide),)), Kernels(float(len(CHAIN.blocks)), (kernel,))),
        )

    decode = tuple(
        step(min(shape.micro_batch_rows, shape.rows - at), 1) for at in range(0, shape.rows, shape.micro_batch_rows)
    )
    tokens = min(shape.prefill_tokens, shape.rows * prompt)
    pool = lengths_of(prompt, new).pool(CHAIN, shape.rows, shape.host_rows)
    return Workload(
        shape=shape,
        pool=pool,
        host=lengths_of(prompt, new).host(shape),
        prompt_tokens=prompt,
        new_tokens=new,
        most_new_tokens=new,
        cache=(Event(-1, CHAIN.pool_bytes(pool)),),
        prompts=(step(1, tokens),),
        prompts_rows=tokens / prompt,
        prompts_a_pass=tokens / prompt,
        first_decode=decode,
        last_decode=decode,
        shares_passes=True,
    )


def overhead(gathers: bool) -> Overhead:
    """Half a GiB of context, and of collectives' buffers where weights are gathered."""
    collectives = GIB // 2 if gathers else 0
    return Overhead(
        context=(GIB // 2, "assumed"),
        workspace=(16 * MIB, "assumed"),
        collectives=(collectives, "assumed"),
        process=(5 * GIB // 2, "assumed"),
    )


def speeds(**changed: Any) -> Speeds:
    """A link of 25 GB/s, a disk of 5."""
    given: dict[str, Any] = {
        "link_gbps": 25.0, "disk_gbps": 5.0, "gather_gbps": 100.0, "tflops": 100.0, "hbm_gbps": 1000.0,
        "launch_s": 8e-6, "model_launch_s": 21e-6, "triton_launch_s": 39e-6, "fill_gbps": 4.0, "place_gbps": 8.0,
        "host_read_gbps": 50.0, "disk_reads_per_s": 50_000,
        "fitted": fitted_figures(),
    }  # fmt: skip
    return Speeds(**{**given, **changed})


def machine_of(*, gpus: int = 1, gpu_bytes: int = 24 * GIB, free_bytes: int | None = None, host_bytes: int) -> Machine:
    """`gpus` equal GPUs; of each `free_bytes` are free, all of it if nothing is said."""
    free = gpu_bytes if free_bytes is None else free_bytes
    return Machine(
        gpus=tuple(
            Gpu(
                index=index,
                name="GPU",
                total_bytes=gpu_bytes,
                free_bytes=free,
                other_bytes=gpu_bytes - free,
                pcie_generation=4,
                pcie_width=16,
                capability=(8, 0),
            )
            for index in range(gpus)
        ),
        memory=Memory(
            total_bytes=host_bytes,
            available_bytes=host_bytes,
            cgroup_limit_bytes=None,
            swap_bytes=0,
            shared_memory_bytes=0,
            memlock_bytes=None,
            numa_nodes=1,
        ),
        disks=(),
        cores=16,
    )
