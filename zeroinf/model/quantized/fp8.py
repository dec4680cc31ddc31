"""Checkpoints in FP8 as DeepSeek publishes them: a scale for each square block of a weight, or one for all of it."""

from __future__ import annotations

from functools import partial
from math import ceil
from typing import Any

import torch
from torch.nn import Linear

from zeroinf.model.quantized.expansion import Expansion, Held, meta, refused


def hold_fp8(model: Any, found: dict[str, Any]) -> None:
    """Weights in FP8 and a scale for each square block of them, or one for all. Activations stay as they are."""
    from transformers import FineGrainedFP8Config
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    for part, usual in (("scale_fmt", "float"), ("expert_dtype", "fp8"), ("modules_to_convert", None)):
        if found.get(part, usual) != usual:
            raise refused(model, f"fp8 with {part} {found[part]}", f"only {part} {usual} expands")
    config = FineGrainedFP8Config(**found)
    kept = HfQuantizer.get_modules_to_not_convert(model, config.modules_to_not_convert, model._keep_in_fp32_modules)
    height, width = config.weight_block_size or (0, 0)
    for name, module in model.named_modules():
        if type(module) is not Linear or not should_convert_module(name, kept):
            continue
        rows, columns = module.weight.shape
        if width and columns % width:
            raise refused(model, f"fp8 in blocks of {width} columns", f"{name} has {columns}, which they do not fill")
        dtype = module.weight.dtype
        module.weight = meta((rows, columns), torch.float8_e4m3fn)
        scales = (ceil(rows / height), columns // width) if width else ()
        module.weight_scale_inv = meta(scales, torch.float32)
        Expansion(module, partial(_expand_fp8, height, dtype))


def _expand_fp8(block_rows: int, dtype: torch.dtype, held: Held) -> dict[str, torch.Tensor]:
    """Values that `dtype` holds exactly, times float32, rounded once: in place, nothing is written out in float32."""
    weight, scales = held["weight"].to(dtype), held["weight_scale_inv"]
    of_rows = scales.repeat_interleave(block_rows, dim=0)[: weight.shape[0]] if scales.dim() else scales.view(1, 1)
    weight.view(weight.shape[0], of_rows.shape[1], -1).mul_(of_rows[..., None])
    return {"weight": weight}
