"""Experts whose weights are 4-bit codes (MXFP4) of which 32 share a power of two, held as products read them.

Checkpoints of gpt-oss have them in this layout. Those of other formats are brought into it as they are read, an expert
at a time, so that one path multiplies by all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import Module

from zeroinf.compat import quantizers
from zeroinf.compat.modules import own_parameters
from zeroinf.model.quantized.expansion import Expansion, ExpertCodes, Held, meta, whole_weights
from zeroinf.model.quantized.fp4 import expand_fp4
from zeroinf.model.stored_parts import StoredPart, set_parts

GROUP = 32
"""Codes that share a power of two."""
_PRODUCTS = ({"gate_up_proj", "down_proj"}, {"up_proj", "down_proj"})
"""Names of the weights of both products, with a gate and without."""


@dataclass(frozen=True, slots=True)
class CodedParts:
    """The stored tensors that the codes and the powers of two of a weight are made of."""

    codes: tuple[StoredPart, ...]
    """Each makes (experts, outputs, groups, 16; uint8)."""
    powers: tuple[StoredPart, ...]
    """Each makes (experts, outputs, groups; uint8)."""


def hold_mxfp4(model: Any, found: dict[str, Any]) -> None:
    """Let experts hold their codes, transposed, and the powers of two."""
    experts_class = quantizers.gpt_oss_experts()
    names, kept = ("gate_up_proj", "down_proj"), found.get("modules_to_not_convert")
    for path, module in model.named_modules():
        if isinstance(module, experts_class) and quantizers.is_quantized(path, kept):
            hold_coded_experts(module, dict.fromkeys(names), is_transposed=True)


def can_hold_coded(names: Collection[str]) -> bool:
    """Whether these are all the weights of experts: either all are codes, or the module is expanded."""
    return set(names) in _PRODUCTS


def hold_coded_experts(module: Module, parts: Mapping[str, CodedParts | None], *, is_transposed: bool) -> None:
    """Let `module` hold codes in place of the weights that `parts` names: (experts, outputs, inputs), or (experts,
    inputs, outputs) if `is_transposed`. Without parts, the checkpoint has codes and powers by their own names."""
    own = own_parameters(module)
    (dtype,) = {own[name].dtype for name in parts}
    for name, made_of in parts.items():
        shape = own.pop(name).shape
        experts, outputs, inputs = (shape[0], shape[2], shape[1]) if is_transposed else shape
        groups = experts, outputs, inputs // GROUP
        codes, powers = meta((*groups, GROUP // 2), torch.uint8), meta(groups, torch.uint8)
        if made_of is not None:
            set_parts(codes, made_of.codes)
            set_parts(powers, made_of.powers)
        module.register_parameter(f"{name}_blocks", codes)
        module.register_parameter(f"{name}_scales", powers)
    names = tuple(parts)
    Expansion(module, partial(_expand_mxfp4, names, dtype, is_transposed), partial(_codes, names))


def _codes(names: tuple[str, ...], held: Held) -> dict[str, ExpertCodes]:
    return {name: ExpertCodes(held[f"{name}_blocks"], held[f"{name}_scales"]) for name in names}


def _expand_mxfp4(
    names: tuple[str, ...], dtype: torch.dtype, is_transposed: bool, held: Held
) -> dict[str, torch.Tensor]:
    found = {}
    for name in names:
        blocks, scales = held[f"{name}_blocks"], held[f"{name}_scales"]
        experts, outputs, groups, _ = blocks.shape
        shape = (experts, groups * GROUP, outputs) if is_transposed else (experts, outputs, groups * GROUP)
        found[name] = whole_weights(shape, dtype, blocks.device, is_transposed=is_transposed)
        into = found[name].mT if is_transposed else found[name]
        expand_fp4(into, blocks.flatten(-2), scales, None, False)
    return found
