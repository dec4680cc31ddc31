"""How much smaller weights are under DeepSpeed's own codes (its `weight_quantization.quantized_initialization`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from zeroinf.model.anatomy import DTYPE_BYTES, Anatomy, TensorSpec

_CODED_MODULES = (nn.Linear, nn.Embedding)
"""`WEIGHT_QUANTIZATION_LAYERS` of deepspeed/inference/quantization/utils.py: these very types, no kinds of them."""


def expanded_bytes(anatomy: Anatomy, codes: Mapping[str, Any]) -> int:
    """What the largest weight of `anatomy`, none of which is coded yet, takes while DeepSpeed makes it of its codes:
    itself, and a byte an element where they are of 4 bits."""
    unpacked = 1 if codes["num_bits"] == 4 else 0
    matrices = (tensor for tensor in anatomy.tensors() if len(tensor.shape) == 2 and not tensor.is_buffer)
    return max((tensor.numel * (unpacked + DTYPE_BYTES[tensor.dtype]) for tensor in matrices), default=0)


def with_codes(anatomy: Anatomy, model: nn.Module, codes: Mapping[str, Any]) -> Anatomy:
    """`anatomy` with its weights as DeepSpeed keeps them: codes, scales and least values, flat and in its dtype.

    `model` has the modules of the anatomy, on any device; `codes` is the JSON's section, checked.
    """
    names = {f"{name}.weight" for name, module in model.named_modules() if type(module) in _CODED_MODULES}

    def coded(tensor: TensorSpec) -> TensorSpec:
        if tensor.name not in names:
            return tensor
        groups = tensor.numel // codes["group_size"]
        packed = tensor.numel * codes["num_bits"] // 8 // DTYPE_BYTES[tensor.dtype]
        return replace(tensor, shape=(packed + 2 * groups,))

    return replace(
        anatomy,
        outside=tuple(map(coded, anatomy.outside)),
        blocks=tuple(replace(block, tensors=tuple(map(coded, block.tensors))) for block in anatomy.blocks),
    )
