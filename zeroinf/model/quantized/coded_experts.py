"""Lets modules of experts hold their weights as codes in the order in which products read them.

Checkpoints of gpt-oss have them so. Those of other formats are brought into this order as they are read, a matrix at a
time, so that one path multiplies by all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial

import torch
from torch.nn import Module

from zeroinf.compat.modules import own_parameters
from zeroinf.model.quantized.expansion import Expansion, Held, meta, whole_weights
from zeroinf.model.quantized.expert_codes import CodeKind, ExpertCodes, expand_experts
from zeroinf.model.stored_parts import StoredPart, set_parts

_PRODUCTS = ({"gate_up_proj", "down_proj"}, {"up_proj", "down_proj"})
"""Names of the weights of both products, with a gate and without."""

Parts = Mapping[str, tuple[StoredPart, ...]]
"""What each of `tensors_of` is made of."""


def can_hold_coded(names: Collection[str]) -> bool:
    """Whether these are all the weights of experts: either all are codes, or the module is expanded."""
    return set(names) in _PRODUCTS


def tensors_of(
    kind: CodeKind, experts: int, outputs: int, inputs: int, matrices: int = 1
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what is held of the weights of one product, joined of so many `matrices` for each expert."""
    groups, per_word = inputs // kind.group, 32 // kind.bits
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "blocks": ((experts, outputs, inputs // per_word), torch.int32),
        "scales": ((experts, outputs, groups), kind.scales),
    }
    if kind.is_float:
        found["blocks"] = (experts, outputs, groups, kind.group // 2), torch.uint8
    if kind.has_zeros:
        found["zeros"] = (experts, outputs // per_word, groups), torch.int32
    if kind.shared:
        found["shared"] = (experts, matrices, 1), torch.float32
    return found


def hold_coded_experts(
    module: Module, kind: CodeKind, parts: Mapping[str, Parts | None], *, is_transposed: bool, matrices: int = 1
) -> None:
    """Let `module` hold codes in place of the weights that `parts` names: (experts, outputs, inputs), or (experts,
    inputs, outputs) if `is_transposed`. Without parts, the checkpoint has codes and scales by their own names. So many
    `matrices` of the checkpoint are joined in the weights that are not `down_proj`."""
    own = own_parameters(module)
    (dtype,) = {own[name].dtype for name in parts}
    for name, made_of in parts.items():
        shape = own.pop(name).shape
        experts, outputs, inputs = (shape[0], shape[2], shape[1]) if is_transposed else shape
        joined = 1 if name == "down_proj" else matrices
        for role, (size, held) in tensors_of(kind, experts, outputs, inputs, joined).items():
            parameter = meta(size, held)
            if made_of is not None:
                set_parts(parameter, made_of[role])
            module.register_parameter(f"{name}_{role}", parameter)
    names = tuple(parts)
    Expansion(module, partial(_expand, kind, names, dtype, is_transposed), partial(_codes, kind, names))


def _codes(kind: CodeKind, names: tuple[str, ...], held: Held) -> dict[str, ExpertCodes]:
    return {
        name: ExpertCodes(
            kind,
            held[f"{name}_blocks"].view(torch.uint8).flatten(2),
            held[f"{name}_scales"],
            held.get(f"{name}_zeros"),
            held.get(f"{name}_shared"),
        )
        for name in names
    }


def _expand(
    kind: CodeKind, names: tuple[str, ...], dtype: torch.dtype, is_transposed: bool, held: Held
) -> dict[str, torch.Tensor]:
    found = {}
    for name, codes in _codes(kind, names, held).items():
        experts, outputs, inputs = codes.shape
        shape = (experts, inputs, outputs) if is_transposed else (experts, outputs, inputs)
        found[name] = whole_weights(shape, dtype, codes.codes.device, is_transposed=is_transposed)
        expand_experts(found[name].mT if is_transposed else found[name], codes)
    return found
