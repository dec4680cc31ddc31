"""Operators of torch that expand a matrix, or a stack of matrices, in one call: on a GPU by one kernel.

On the meta device an operator does nothing, and counts as one kernel that reads codes and writes weights. Its first
argument, `whole` (..., rows, columns; strided), is its output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from zeroinf.errors import EnvironmentProblem

_LIBRARY: Any = torch.library.Library("zeroinf", "DEF")  # type: ignore[no-untyped-call]


def fused(schema: str, on_cpu: Callable[..., None]) -> Callable[..., None]:
    """The operator of `schema`: `on_cpu` on the CPU, the function of its name in `expansion_kernels` on a GPU."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)

    def on_gpu(*args: Any) -> None:
        from zeroinf.model.quantized import expansion_kernels

        getattr(expansion_kernels, name)(*args)

    _LIBRARY.impl(name, on_cpu, "CPU")
    _LIBRARY.impl(name, on_gpu, "CUDA")
    _LIBRARY.impl(name, _on_paper, "Meta")
    operator: Callable[..., None] = getattr(torch.ops.zeroinf, name)
    return operator


def _on_paper(*ignored: Any) -> None:
    """Nothing is computed."""


def require_kernels(device: torch.device) -> None:
    """Raise EnvironmentProblem where `device` is a GPU for which kernels cannot be built."""
    if device.type != "cuda":
        return
    try:
        whole = torch.empty(1, 32, dtype=torch.bfloat16, device=device)
        packed = torch.zeros(1, 34, dtype=torch.uint8, device=device)
        from zeroinf.model.quantized.expansion_kernels import expand_ggml

        expand_ggml(whole, packed, 8, 32, 34)
    except (ImportError, RuntimeError, OSError) as error:
        raise EnvironmentProblem(
            f"quantized weights cannot be expanded on this GPU: {str(error).splitlines()[0]}",
            hint="Triton needs a C compiler (apt install gcc)",
        ) from error
