"""Checkpoints of gpt-oss: experts as 4-bit codes (MXFP4), of which 32 share a power of two."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from zeroinf.compat import quantizers
from zeroinf.compat.modules import own_parameters
from zeroinf.model.quantized.expansion import Expansion, ExpertCodes, Held, meta, whole_weights
from zeroinf.model.quantized.fp4 import expand_fp4

# So many codes share a power of two.
_FP4_GROUP = 32


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
        Expansion(module, partial(_expand_mxfp4, names, dtype), partial(_codes, names))


def _codes(names: tuple[str, ...], held: Held) -> dict[str, ExpertCodes]:
    return {name: ExpertCodes(held[f"{name}_blocks"], held[f"{name}_scales"]) for name in names}


def _expand_mxfp4(names: tuple[str, ...], dtype: torch.dtype, held: Held) -> dict[str, torch.Tensor]:
    found = {}
    for name in names:
        blocks, scales = held[f"{name}_blocks"], held[f"{name}_scales"]
        experts, outputs, groups, _ = blocks.shape
        shape = experts, groups * _FP4_GROUP, outputs
        found[name] = whole_weights(shape, dtype, blocks.device, is_transposed=True)
        expand_fp4(found[name].mT, blocks.flatten(-2), scales, None, False)
    return found
