"""Sizes and expansion costs of DeepSpeed's own quantized weights (`weight_quantization.quantized_initialization`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from zeroinf.model.anatomy import Anatomy, TensorSpec
from zeroinf.model.dtypes import DTYPE_BYTES
from zeroinf.planner.workload import ExpansionCost, Kernel, Kernels

_CODED_MODULES = (nn.Linear, nn.Embedding)
"""`WEIGHT_QUANTIZATION_LAYERS` of deepspeed/inference/quantization/utils.py: these very types, no kinds of them."""


def expansion(anatomy: Anatomy, model: nn.Module, codes: Mapping[str, Any]) -> ExpansionCost:
    """The cost of DeepSpeed's expansion of the weights of `anatomy`, none of which is quantized yet: of the largest one
    itself is alive, and a byte an element where codes are of 4 bits. For `model` and `codes` see `with_codes`."""
    unpacked = 1 if codes["num_bits"] == 4 else 0
    names = _coded_names(model)
    matrices = [tensor for tensor in anatomy.tensors() if len(tensor.shape) == 2 and not tensor.is_buffer]
    most = max((tensor.numel * (unpacked + DTYPE_BYTES[tensor.dtype]) for tensor in matrices), default=0)
    kernels = (kernel for tensor in matrices if tensor.name in names for kernel in _kernels(tensor, codes))
    return ExpansionCost(nbytes=most, kernels=(Kernels(1.0, tuple(kernels)),))


def _kernels(tensor: TensorSpec, codes: Mapping[str, Any]) -> Iterator[Kernel]:
    """The kernels that `DeQuantizer` launches for one weight."""
    elements, packed = tensor.numel, tensor.numel * codes["num_bits"] // 8
    full = elements * DTYPE_BYTES[tensor.dtype]
    if tensor.dtype == "float16" and codes["group_dim"] == 1 and codes["group_size"] % 8 == 0:
        yield Kernel(0, packed + full)
        return
    for _ in range(2 if codes["num_bits"] == 4 else 0):  # one half of each byte, then the other, to every other place
        yield Kernel(0, 2 * packed)
        yield Kernel(0, 2 * packed, pattern="crossed")
    yield Kernel(0, full)
    yield Kernel(0, elements + full, pattern="converted")
    yield from (Kernel(0, 2 * full),) * 2


def _coded_names(model: nn.Module) -> set[str]:
    return {f"{name}.weight" for name, module in model.named_modules() if type(module) in _CODED_MODULES}


def with_codes(anatomy: Anatomy, model: nn.Module, codes: Mapping[str, Any]) -> Anatomy:
    """`anatomy` with its weights as DeepSpeed keeps them: codes, scales and least values, flat and in its dtype.

    `model` has the modules of the anatomy, on any device; `codes` is the JSON's section, checked.
    """
    names = _coded_names(model)

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
