"""Measures one GPU's arithmetic and memory rates, and the host time of a kernel launch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

# One row is decoding's worst case, 8192 rows make the matrices square.
ROWS = (1, 8, 64, 512, 4096, 8192)
# Larger than the caches of today's GPUs in every dtype, as a large model's weights are.
_WIDTH = 8192
_COPY_BYTES = 1 << 30
_MEASURED_S = 0.1
_LAUNCHES = 200  # fewer than the driver queues, so that the host never waits for the GPU
_LAUNCH_ROUNDS = 20
_SMALL_LLAMA: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 1024,
}
_STEPS = 3  # of a few hundred kernels each
_WARM_UP_S = 1.0  # a host was seen to launch its first ones in 25 us each, and in 16 a second later


def measure_matmul(dtype: str) -> dict[int, float]:
    """TFLOP/s of a linear layer of 8192 x 8192 by the number of rows that run together."""
    import torch

    # Random numbers, since zeros take less power and so run faster than weights do.
    weight = torch.randn(_WIDTH, _WIDTH, device="cuda").to(getattr(torch, dtype))
    hidden = torch.randn(max(ROWS), _WIDTH, device="cuda").to(weight.dtype)

    def seconds(rows: int) -> float:
        return _device_seconds(lambda: torch.nn.functional.linear(hidden[:rows], weight))

    return {rows: 2 * rows * _WIDTH**2 / seconds(rows) / 1e12 for rows in ROWS}


def measure_hbm() -> float:
    """A copy of 1 GiB inside GPU memory, in GB/s of bytes read plus bytes written."""
    import torch

    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / _device_seconds(lambda: target.copy_(source)) / 1e9


def measure_launch() -> float:
    """Seconds of host time an operator takes whose kernel does next to nothing."""
    import torch

    number = torch.zeros(1, device="cuda")

    def one_round() -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(_LAUNCHES):
            number.add_(1)
        return (time.perf_counter() - started) / _LAUNCHES

    one_round()
    return statistics.median(one_round() for _ in range(_LAUNCH_ROUNDS))


def measure_model_launch(device: str = "cuda") -> float:
    """Seconds of host time a kernel takes that a transformers model launches: a decode step of a Llama that is too
    small for its GPU to be what takes time."""
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    # Written out: cuDNN's attention would build a plan for each new length of the cache (docs/decisions/0008).
    config = LlamaConfig(**_SMALL_LLAMA, attn_implementation="eager")
    model = LlamaForCausalLM(config).to(device, torch.float16).eval()
    cache, token = DynamicCache(config=config), torch.zeros(1, 1, dtype=torch.int64, device=device)

    def step() -> None:
        model(token, None, None, cache)  # by place: transformers 5.24 gave the cache another name

    def steps() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(_STEPS):
            step()
        return (time.perf_counter() - started) / _STEPS

    with torch.no_grad():
        warm_at = time.perf_counter() + _WARM_UP_S
        while time.perf_counter() < warm_at:
            steps()
        step_s = statistics.median(steps() for _ in range(_LAUNCH_ROUNDS))
        return step_s / kernels_of(step)


def measure_triton_launch() -> float:
    """Seconds of host time that a launch of a Triton kernel takes, with as many arguments as kernels of experts have.

    Raises RuntimeError where Triton is missing or cannot compile.
    """
    import torch

    from zeroinf.compat.launches import Launch

    try:
        from zeroinf.hardware.measure.triton_kernel import touch
    except ImportError as error:
        raise RuntimeError(f"no Triton: {error}") from error
    launch, tensors = Launch(touch), [torch.zeros(16, device="cuda") for _ in range(6)]

    def one_round() -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(_LAUNCHES):
            launch((1,), tensors, (16, 16, 16, 16), BLOCK=16)
        return (time.perf_counter() - started) / _LAUNCHES

    one_round()
    return statistics.median(one_round() for _ in range(_LAUNCH_ROUNDS))


def kernels_of(work: Callable[[], object]) -> int:
    """Count the kernels that the operators of `work` launch: one each, except for views."""
    import torch

    from zeroinf.compat.dispatch import UNSAFE_VIEW, TorchDispatchMode

    number = 0

    class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal number
            number += not (func.is_view or func in allocating)
            return func(*args, **(kwargs or {}))

    aten = torch.ops.aten
    allocating = {UNSAFE_VIEW, aten.empty.memory_format, aten.empty_like.default}
    with Counting():  # type: ignore[no-untyped-call]
        work()
    return number


def _device_seconds(work: Callable[[], object]) -> float:
    """Seconds that `work` takes on the GPU, once it is warm, over at least a tenth of a second."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    repeats = 1
    while True:
        work()
        begin.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        elapsed_s: float = begin.elapsed_time(end) / 1e3
        if elapsed_s >= _MEASURED_S:
            return elapsed_s / repeats
        repeats *= 4
