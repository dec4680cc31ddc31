"""Rotary positions of any model as one kernel on a GPU, in place of the ten that torch's operators take.

A model's function for them is known by what it computes for numbers drawn at random. It is replaced for the process by
one that asks where its arguments lie: on a GPU that runs the kernel, that computes the same bits; everywhere else, and
for arguments of other shapes, the model's own function does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch

from zeroinf.compat.rotary import replace_rotation, rotations_of, takes_queries_and_keys
from zeroinf.engines.stream.products import DTYPES
from zeroinf.planner.descriptor import KERNEL_CAPABILITY

Pair = tuple[torch.Tensor, torch.Tensor]
_on_meta: ContextVar[Callable[..., Pair] | None] = ContextVar("rotates_on_meta", default=None)


def use_rotary_kernels(model: Any, device: torch.device) -> None:
    """Let `model` rotate by the kernel where that runs, on `device` for one, if its function computes what the kernel
    does."""
    for name, own in rotations_of(model):
        if not isinstance(own, Rotation) and takes_queries_and_keys(own) and _is_by_halves(own):
            replace_rotation(name, Rotation(own))
    if device.type == "cuda":
        _kernel(device, model.dtype)  # tried before it is used: to try it waits for the GPU


@contextmanager
def rotating_on_meta(rotate: Callable[..., Pair]) -> Iterator[None]:
    """While it lasts, tensors on the meta device are rotated by `rotate`, as on a GPU by the kernel."""
    token = _on_meta.set(rotate)
    try:
        yield
    finally:
        _on_meta.reset(token)


class Rotation:
    """Rotates by the kernel what that takes, and all else by `own`, a model's function."""

    def __init__(self, own: Callable[..., Any]) -> None:
        self._own = own

    def __call__(self, q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        rotate = None if args or kwargs else _kernel_for(q, k, cos, sin)
        return self._own(q, k, cos, sin, *args, **kwargs) if rotate is None else rotate(q, k, cos, sin)


def by_halves(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
    """What the kernel computes, in torch."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def turned(x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat((-high, low), -1) * sin

    return turned(q), turned(k)


def _is_by_halves(own: Callable[..., Any]) -> bool:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, cos, sin = (
            torch.randn(shape, generator=generator).to(dtype)
            for shape in ((1, 4, 3, 8), (1, 2, 3, 8), (1, 3, 8), (1, 3, 8))
        )
        try:
            found = own(q, k, cos, sin)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False
        if not all(torch.equal(one, other) for one, other in zip(found, by_halves(q, k, cos, sin), strict=True)):
            return False
    return True


def _kernel_for(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Callable[..., Pair] | None:
    """The kernel, None where it does not take these."""
    if not (q.is_cuda or q.is_meta) or not q.dim() == k.dim() == 4 or cos.dim() != 3 or cos.shape != sin.shape:
        return None
    batch, _, tokens, width = q.shape
    shaped = k.shape[2:] == (tokens, width) and tuple(cos.shape) in ((1, tokens, width), (batch, tokens, width))
    alike = q.dtype == k.dtype == cos.dtype == sin.dtype and cos.stride() == sin.stride()
    adjacent = q.stride(3) == k.stride(3) == cos.stride(2) == 1
    if not (shaped and alike and adjacent and width % 2 == 0 and q.numel()):
        return None
    return _on_meta.get() if q.is_meta else _kernel(q.device, q.dtype)


@cache
def _kernel(device: torch.device, dtype: torch.dtype) -> Callable[..., Pair] | None:
    """The kernel where it computes on `device` what torch does; where it does not, a warning says why."""
    if dtype not in DTYPES or torch.cuda.get_device_capability(device) < KERNEL_CAPABILITY:
        return None
    try:
        from zeroinf.engines.stream.rotary_kernels import rotate

        for heads, width in ((32, 128), (6, 80)):
            shapes = (2, heads, 5, width), (2, 2, 5, width), (2, 5, width), (2, 5, width)
            given = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
            if not all(torch.equal(*pair) for pair in zip(rotate(*given), by_halves(*given), strict=True)):
                raise RuntimeError("positions are not those of torch")
    except Exception as error:  # Triton has errors of many kinds, and none of them may end a run
        why = (str(error).splitlines() or [type(error).__name__])[0]
        logging.getLogger(__name__).warning("positions are rotated by torch, since the kernel for it fails: %s", why)
        return None
    return rotate
