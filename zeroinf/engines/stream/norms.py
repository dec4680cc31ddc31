"""RMS norms of any model as one kernel on a GPU, in place of the six that torch's operators take.

A module is known by what it computes, not by its name: one that has a weight and nothing else, and that gives, in
float32 and in bfloat16, what one of the forms gives for numbers drawn at random. Everything else runs as it is.
"""

from __future__ import annotations

import copy
import inspect
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn import Module

from zeroinf.compat.modules import own_buffers, own_parameters
from zeroinf.engines.stream.products import DTYPES
from zeroinf.planner.descriptor import KERNEL_CAPABILITY

_TRYING = threading.Lock()
_TRIED = 64
"""Elements of a row that a module is tried with."""
_MOST = 1 << 14
"""Elements of a row for which there is a kernel."""


@dataclass(frozen=True, slots=True)
class NormForm:
    """How a module computes: what it divides by the root of the mean square, it multiplies by its weight."""

    eps: float
    rounds_first: bool
    """It rounds to the dtype of its input before it multiplies."""
    adds_one: bool
    """It multiplies by one more than its weight."""

    def compute(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """In torch."""
        value = x.float()
        value = value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.rounds_first:
            value = value.to(x.dtype).float()
        return (value * (weight.float() + 1.0 if self.adds_one else weight.float())).to(x.dtype)


def norms_of(model: Module) -> Iterator[tuple[Module, NormForm]]:
    """The modules of `model` that compute an RMS norm, each with its form."""
    known: dict[Any, NormForm | None] = {}
    for module in model.modules():
        weight = own_parameters(module).get("weight")
        if weight is None or weight.dim() != 1 or not _has_nothing_else(module):
            continue
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not isinstance(eps, float):
            continue
        key = type(module), eps
        if key not in known:
            known[key] = _form(module, eps)
        if (form := known[key]) is not None:
            yield module, form


def _has_nothing_else(module: Module) -> bool:
    if len(own_parameters(module)) > 1 or own_buffers(module) or next(module.children(), None) is not None:
        return False
    try:
        given = inspect.signature(type(module).forward).parameters
    except (TypeError, ValueError):
        return False
    return len(given) == 2 and "forward" not in vars(module)


def _form(module: Module, eps: float) -> NormForm | None:
    """The form that `module` computes, None where there is none."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(9, _TRIED, generator=generator), torch.randn(_TRIED, generator=generator)
    x *= torch.logspace(-4, 2, 9)[:, None]
    forms = [NormForm(eps, first, one) for first in (True, False) for one in (False, True)]
    for dtype in (torch.float32, torch.bfloat16):
        given, scale = x.to(dtype), weight.to(dtype)
        try:
            found = _tried(module, scale)(given)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
            return None
        if not isinstance(found, torch.Tensor) or found.dtype != dtype:
            return None
        forms = [form for form in forms if torch.allclose(found, form.compute(given, scale), rtol=1e-5, atol=1e-7)]
    return forms[0] if forms else None


def _tried(module: Module, weight: torch.Tensor) -> Module:
    """`module` with another weight."""
    other = copy.copy(module)
    other.__dict__["_parameters"] = {"weight": weight}
    return other


def use_norm_kernels(model: Any, device: torch.device) -> None:
    """Let RMS norms of `model` run by the kernel, where it runs on `device`."""
    if not norm_kernel_runs(device, model.dtype):
        return
    from zeroinf.engines.stream.norm_kernels import rms_norm

    for module, form in list(norms_of(model)):
        NormByKernel(module, form, rms_norm)


def norm_kernel_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel computes on `device` what the forms do, to rounding: where it does not, a warning says why.
    Tried once: a thread that asks while another tries waits for it."""
    with _TRYING:
        return _kernel_runs(device, dtype)


@cache
def _kernel_runs(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < KERNEL_CAPABILITY or dtype not in DTYPES:
        return False
    try:
        from zeroinf.engines.stream.norm_kernels import rms_norm

        for width in (_TRIED, 2048):
            x, weight = torch.randn(40, width, device=device, dtype=dtype), torch.rand(width, device=device).to(dtype)
            for form in (NormForm(1e-6, first, one) for first in (True, False) for one in (False, True)):
                found = rms_norm(x, weight, form.eps, rounds_first=form.rounds_first, adds_one=form.adds_one).float()
                if not torch.allclose(found, form.compute(x, weight).float(), rtol=0.02, atol=1e-3):
                    raise RuntimeError("they are not those of torch")
    except Exception as error:  # Triton has errors of many kinds, and none of them may end a run
        why = (str(error).splitlines() or [type(error).__name__])[0]
        logging.getLogger(__name__).warning("norms are computed by torch, since the kernel for them fails: %s", why)
        return False
    return True


class NormByKernel:
    """Computes the norm `module` by a kernel, where its input suits that."""

    def __init__(self, module: Module, form: NormForm, kernel: Any) -> None:
        self._own, self._form, self._run, self._kernel = own_parameters(module), form, module.forward, kernel
        module.forward = self.forward

    def forward(self, x: torch.Tensor) -> Any:
        """The norm of `x` (..., width)."""
        weight, form = self._own["weight"], self._form
        if weight is None or x.dtype != weight.dtype or not x.is_contiguous() or not 0 < x.shape[-1] <= _MOST:
            return self._run(x)
        return self._kernel(x, weight, form.eps, rounds_first=form.rounds_first, adds_one=form.adds_one)
