"""Rotary embeddings of any model as one kernel on a GPU, in place of the dozen that torch's operators take.

transformers' models call a function of their module, `apply_rotary_pos_emb(q, k, cos, sin)`. It is known by what it
computes: one that gives in float32 and in bfloat16, bit by bit, what turning halves of the columns gives for numbers
drawn at random is replaced by a function that asks a kernel where there is one. Everything else runs as it is.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn import Module

from zeroinf.engines.stream.products import DTYPES
from zeroinf.planner.descriptor import KERNEL_CAPABILITY

_NAME = "apply_rotary_pos_emb"
_GIVEN = ("q", "k", "cos", "sin")
_WIDTH = 16
"""Columns of a head that a function is tried with."""
_MOST = 1024
"""Columns of a head for which there is a kernel."""

Rotate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""See `rotary_kernels.rotate`."""

_active = threading.local()


@dataclass(frozen=True, slots=True)
class RotaryForm:
    """The tables of angles that a function takes for heads of so many columns."""

    halves: bool
    """A table has a column for each pair of columns of a head, not for each column."""
    partly: bool
    """Columns beyond the table's are left as they are."""

    def turned(self, width: int, table: int) -> int:
        """The columns that it turns, of heads of `width`, with tables of `table` columns; 0 where it takes no such."""
        turned = table * 2 if self.halves else table
        return turned if turned == width or (self.partly and turned < width and turned % 2 == 0) else 0


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, turned: int) -> torch.Tensor:
    """In torch: `x` (rows, heads, tokens, width), of which the first `turned` columns are turned; see
    `rotary_kernels.rotate`."""
    times = turned // cos.shape[-1]
    cos, sin = cos.repeat(1, 1, times)[:, None], sin.repeat(1, 1, times)[:, None]
    first, second = x[..., : turned // 2], x[..., turned // 2 : turned]
    moved = x[..., :turned] * cos + torch.cat((-second, first), -1) * sin
    return torch.cat((moved, x[..., turned:]), -1)


class Rotary:
    """A model's function for rotary embeddings, by a kernel where one is active and the input suits it."""

    def __init__(self, function: Any, form: RotaryForm) -> None:
        functools.update_wrapper(self, function)
        self._function, self._form = function, form

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        rotate: Rotate | None = getattr(_active, "rotate", None)
        given = dict(zip(_GIVEN, args, strict=False)) | kwargs
        if rotate is None or len(args) + len(kwargs) != len(_GIVEN) or given.keys() != set(_GIVEN):
            return self._function(*args, **kwargs)  # some models turn one tensor alone
        q, k, cos, sin = (given[name] for name in _GIVEN)
        if not self._suits(q, k, cos, sin):
            return self._function(*args, **kwargs)
        return rotate(q, k, cos, sin, self._form.turned(q.shape[-1], cos.shape[-1]))

    def _suits(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
        return (
            q.dim() == k.dim() == 4
            and cos.dim() == 3
            and len(q) == len(k) == len(cos) == 1
            and q.shape[2:] == k.shape[2:]
            and q.shape[2] == cos.shape[1] > 0
            and cos.shape == sin.shape
            and q.dtype == k.dtype == cos.dtype == sin.dtype
            and q.stride(3) == k.stride(3) == 1
            and cos.is_contiguous()
            and sin.is_contiguous()
            and q.shape[3] <= _MOST
            and self._form.turned(q.shape[3], cos.shape[2]) > 0
        )


@contextmanager
def rotating(rotate: Rotate | None) -> Iterator[None]:
    """While it lasts, functions that `find_rotary` has replaced compute by `rotate` in this thread."""
    before = getattr(_active, "rotate", None)
    _active.rotate = rotate
    try:
        yield
    finally:
        _active.rotate = before


def find_rotary(model: Module) -> bool:
    """Replace the functions for rotary embeddings that modules of `model` call, where they are known. Without
    `rotating`, they do what they did. Returns whether there is one."""
    found = False
    for name in sorted({type(module).__module__ for module in model.modules()}):
        space = vars(sys.modules.get(name, object))
        function = space.get(_NAME)
        if function is not None and not isinstance(function, Rotary) and (form := _form(function)) is not None:
            setattr(sys.modules[name], _NAME, Rotary(function, form))
        found |= isinstance(space.get(_NAME), Rotary)
    return found


@cache
def _form(function: Any) -> RotaryForm | None:
    """The form that `function` has, None where there is none."""
    for halves in (False, True):
        if not _does(function, halves, _WIDTH):
            continue
        return RotaryForm(halves, partly=_does(function, halves, _WIDTH // 2))
    return None


def _does(function: Any, halves: bool, turned: int) -> bool:
    """Whether `function` turns the first `turned` of `_WIDTH` columns."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        q, k = (torch.randn(1, heads, 7, _WIDTH, generator=generator).to(dtype) for heads in (4, 2))
        angles = torch.randn(1, 7, turned // 2, generator=generator).repeat(1, 1, 1 if halves else 2)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        try:
            found = function(q, k, cos, sin)
        except Exception:  # it takes something else
            return False
        right = [turn(x, cos, sin, turned) for x in (q, k)]
        if not isinstance(found, tuple) or len(found) != 2 or not all(map(_equal, found, right)):
            return False
    return True


def _equal(found: Any, right: torch.Tensor) -> bool:
    return isinstance(found, torch.Tensor) and found.dtype == right.dtype and torch.equal(found, right)


def rotary_kernel(model: Any, device: torch.device) -> Rotate | None:
    """The kernel by which rotary embeddings of `model` are computed on `device`; None where torch computes them."""
    if device.type != "cuda" or not find_rotary(model) or not _runs(device, model.dtype, *_widths(model)):
        return None
    from zeroinf.engines.stream.rotary_kernels import rotate

    return rotate


def _widths(model: Any) -> tuple[int, int]:
    """Columns of a head and those that are turned, as most models' configurations say: the kernel is compiled for
    them, and for others where it meets them."""
    config = model.config.get_text_config()
    hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    width = getattr(config, "head_dim", None)
    if width is None and isinstance(hidden, int) and isinstance(heads, int):
        width = hidden // heads
    share = getattr(config, "partial_rotary_factor", None)
    if not isinstance(width, int) or not 1 < width <= _MOST:
        return _WIDTH, _WIDTH
    return width, max(2, int(width * share) // 2 * 2) if isinstance(share, float) else width


@cache
def _runs(device: torch.device, dtype: torch.dtype, width: int, turned: int) -> bool:
    """Whether the kernel computes on `device` what torch does, to rounding: where it does not, a warning says why."""
    if torch.cuda.get_device_capability(device) < KERNEL_CAPABILITY or dtype not in DTYPES:
        return False
    try:
        from zeroinf.engines.stream.rotary_kernels import rotate

        q, k = (torch.randn(1, 70, heads, width, device=device, dtype=dtype).transpose(1, 2) for heads in (4, 2))
        angles = torch.randn(1, 70, turned // 2, device=device).repeat(1, 1, 2)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        for x, found in zip((q, k), rotate(q, k, cos, sin, turned), strict=True):
            if not torch.allclose(found, turn(x, cos, sin, turned), rtol=0.01, atol=0.03):
                raise RuntimeError("they are not those of torch")
    except Exception as error:  # Triton has errors of many kinds, and none of them may end a run
        why = (str(error).splitlines() or [type(error).__name__])[0]
        logging.getLogger(__name__).warning(
            "rotary embeddings are computed by torch, since the kernel for them fails: %s", why
        )
        return False
    return True
