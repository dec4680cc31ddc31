"""Checkpoints of gpt-oss: experts as 4-bit codes (MXFP4), of which 32 share a power of two."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch

from zeroinf.compat import quantizers
from zeroinf.compat.modules import own_parameters
from zeroinf.model.quantized.expansion import Expansion, Held, meta
from zeroinf.model.quantized.fused import fused

# Values that the codes stand for, and how many codes share a power of two.
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_FP4_GROUP = 32
# Experts are expanded some at a time, or intermediate values of all of them would take three times what they become.
_ELEMENTS_AT_ONCE = 1 << 28


def hold_mxfp4(model: Any, found: dict[str, Any]) -> None:
    """Let experts hold their codes, transposed, and the powers of two."""
    experts_class = quantizers.gpt_oss_experts()
    names, kept = ("gate_up_proj", "down_proj"), found.get("modules_to_not_convert")
    for path, module in model.named_modules():
        if not isinstance(module, experts_class) or not quantizers.is_quantized(path, kept):
            continue
        dtype = module.down_proj.dtype
        for name in names:
            experts, inputs, outputs = own_parameters(module).pop(name).shape
            groups = experts, outputs, inputs // _FP4_GROUP
            module.register_parameter(f"{name}_blocks", meta((*groups, _FP4_GROUP // 2), torch.uint8))
            module.register_parameter(f"{name}_scales", meta(groups, torch.uint8))
        Expansion(module, partial(_expand_mxfp4, names, dtype))


def _expand_mxfp4(names: tuple[str, ...], dtype: torch.dtype, held: Held) -> dict[str, torch.Tensor]:
    found = {}
    for name in names:
        blocks, scales = held[f"{name}_blocks"], held[f"{name}_scales"]
        experts, outputs, groups, _ = blocks.shape
        found[name] = torch.empty(experts, groups * _FP4_GROUP, outputs, dtype=dtype, device=blocks.device)
        _expand_fused(found[name].transpose(1, 2), blocks, scales)
    return found


def _expand(whole: torch.Tensor, blocks: torch.Tensor, scales: torch.Tensor) -> None:
    """Fill `whole` (experts, outputs, inputs)."""
    at_once = max(1, _ELEMENTS_AT_ONCE // whole[0].numel())
    for first in range(0, whole.shape[0], at_once):
        some = slice(first, first + at_once)
        whole[some] = _fp4(blocks[some], scales[some], whole.dtype)


_expand_fused = fused("expand_fp4(Tensor(a!) whole, Tensor packed, Tensor scales) -> ()", _expand)


def _fp4(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weights (experts, outputs, inputs) of their codes, two a byte, and the powers of two that groups share."""
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    values = _fp4_values(dtype, blocks.device).index_select(0, codes.view(-1).int()).view(codes.shape)
    return torch.ldexp(values, scales[..., None].int() - 127, out=values).flatten(-2)


@cache
def _fp4_values(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(_FP4_VALUES, dtype=dtype, device=device)
