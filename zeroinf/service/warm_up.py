"""Compiles kernels on a thread of its own while weights are loaded.

A kernel that is compiled when it is first launched keeps a forward waiting for seconds. Each package that has such
kernels says what a plan needs of them, as calls that compile some each (`_compilations`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import Any

import torch

from zeroinf.engines.stream.experts import expert_compilations, use_experts_kernels
from zeroinf.engines.stream.products import compile_for_experts
from zeroinf.generation.warm_up import attention_compilations
from zeroinf.model.inspect import build_meta
from zeroinf.model.quantized.warm_up import expansion_compilations
from zeroinf.model.source import ModelSource
from zeroinf.planner.plan import Plan
from zeroinf.planner.wire import CODES


def _compilations(model: Any, plan: Plan, device: torch.device) -> Iterable[Callable[[], None]]:
    """Calls that compile kernels for `plan`; `model`, on the meta device, shows with which shapes they are launched."""
    found = expansion_compilations(model, device)
    if plan.forward_tokens and plan.tensor_parallel.size == 1:
        found += attention_compilations(
            model,
            plan.anatomy,
            device,
            row_tokens=plan.row_tokens,
            pages=plan.pool_pages > 0,
            kv_dtype=None if plan.host is None else plan.host.dtype,
        )
    return chain(found, _of_experts(model, plan, device) if plan.engine == "stream" else ())


def _of_experts(model: Any, plan: Plan, device: torch.device) -> Iterator[Callable[[], None]]:
    """Those for experts, found as they are asked for: whether there are any is known once kernels have been tried."""
    if use_experts_kernels(model, device, CODES.get(plan.wire)):
        for count, each in {(own.count, own.each) for own in plan.anatomy.experts}:
            yield partial(compile_for_experts, count, each, device, model.dtype)
        yield from expert_compilations(model, plan.anatomy, plan.wire, device)


class WarmUp:
    """Compiles the kernels of one plan for `device`, a GPU, from its making on."""

    def __init__(self, plan: Plan, source: ModelSource, device: torch.device) -> None:
        self._thread = ThreadPoolExecutor(1, "zeroinf-warm-up")
        model = build_meta(source.config, plan.dtype, source.trust_remote_code)
        self._done = self._thread.submit(_run, _compilations(model, plan, device), device)

    def wait(self) -> str:
        """Wait for all kernels; returns why some of them were not compiled, or nothing."""
        error = self._done.exception()
        return "" if error is None else f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"

    def close(self) -> None:
        """Wait for the kernel that is being compiled, and leave out the others."""
        self._done.cancel()
        self._thread.shutdown(cancel_futures=True)


def _run(compilations: Iterable[Callable[[], None]], device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # threads have one each
    problem: Exception | None = None
    with torch.inference_mode():
        for compile_some in compilations:
            try:
                compile_some()
            except Exception as error:  # Triton has errors of many kinds; the other kernels are compiled all the same
                problem = problem or error
    if problem is not None:
        raise problem
