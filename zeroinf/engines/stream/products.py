"""Chooses the kernels that multiply by weights as they rest: on a GPU that runs them and computes what it should.

Float32 is left to torch, whose products are exact. Where the kernels do not run, a warning says why, once, and weights
are expanded before products.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from functools import cache

import torch

from zeroinf.engines.stream.coded_weight import Product
from zeroinf.engines.stream.tensor_groups import TensorGroup
from zeroinf.model.quantized.expert_codes import CodeKind
from zeroinf.planner.descriptor import KERNEL_CAPABILITY
from zeroinf.planner.wire import Codes

DTYPES = (torch.bfloat16, torch.float16)
_TRYING = threading.Lock()
_SOME = 8
"""Experts of a token in the trial of kernels; how many there are changes none of them, but for one."""


def product_on_codes(device: torch.device, groups: Sequence[TensorGroup]) -> Product | None:
    """The kernel that multiplies by the codes of `groups`; None where these are expanded before."""
    kinds = {group.layout.coded for group in groups if group.layout.coded is not None}
    forms = {(coded.dtype, coded.kind) for coded in kinds}
    if not forms or not all(_runs(device, dtype, kind, 0) for dtype, kind in forms):
        return None
    from zeroinf.engines.stream.product_kernels import product

    return product


def expert_products(device: torch.device, dtype: torch.dtype, kind: Codes | CodeKind | None) -> bool:
    """Whether experts can multiply by weights of `kind` (None: numbers) here."""
    return _runs(device, dtype, kind, _SOME)


def _runs(device: torch.device, dtype: torch.dtype, kind: Codes | CodeKind | None, each: int) -> bool:
    """Whether kernels multiply by weights of `kind` (None: numbers) on `device`; dense ones, or those of experts of
    which a token has `each`. Tried once: a thread that asks while another tries waits for it."""
    with _TRYING:
        return _tried(device, dtype, kind, each)


@cache
def _tried(device: torch.device, dtype: torch.dtype, kind: Codes | CodeKind | None, each: int) -> bool:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < KERNEL_CAPABILITY or dtype not in DTYPES:
        return False
    try:
        from zeroinf.engines.stream.kernel_trials import why_not
    except ImportError as error:
        reason = str(error)
    else:
        reason = why_not(device, dtype, kind or Codes(16, 1), each)
    if reason:
        logging.getLogger(__name__).warning("products are computed by torch, since kernels for them fail: %s", reason)
    torch.cuda.empty_cache()
    return not reason


def compile_for_experts(experts: int, each: int, device: torch.device, dtype: torch.dtype) -> None:
    """Compile what hangs on the number of experts, and of those of a token, before a pass needs it."""
    from zeroinf.engines.stream.expert_kernels import compile_for

    compile_for(experts, each, device, dtype)
