"""Checkpoints of GPTQ (versions 1 and 2, also with `desc_act`), AWQ (`gemm`), and AutoRound, which packs like either.

Layouts: AutoGPTQ's `qlinear_cuda`, GPTQModel's `checkpoint_format`, AutoAWQ's `WQLinear_GEMM`. Words of 32 bits hold
codes along the inputs (GPTQ) or along the outputs (AWQ, in an order of its own); scales and zero points belong to
groups of inputs. GPTQ's version 1 stores zero points less one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Any

import torch

from zeroinf.errors import ModelError
from zeroinf.model.quantized.expansion import OTHER_CHECKPOINT, Held, refused
from zeroinf.model.quantized.fused import Random, fills_units, fused, random_groups, random_scales, random_words
from zeroinf.model.quantized.integers import affine, by_slices, packed_size, unpack
from zeroinf.model.quantized.linears import MatrixFormat, Stored, hold_linears

# Column 4 of each eight lies in the second place of a word, and so on.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_SCALE_TYPES = (torch.float16, torch.bfloat16, torch.float32)


def hold_gptq(model: Any, found: dict[str, Any]) -> None:
    """Let linear layers and experts hold codes, scales, zero points and the order of groups."""
    layout = found.get("checkpoint_format") or found.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise refused(model, f"gptq in the format {layout}", "it runs gptq and gptq_v2")
    if "bits" not in found or "group_size" not in found:
        raise refused(model, "gptq", "its config names no bits and no group_size")
    form = _Gptq(found["bits"], found["group_size"], bool(found.get("desc_act")), 1 if layout == "gptq" else 0)
    hold_linears(model, found, "gptq", form, "qweight", _kept(found))


def hold_awq(model: Any, found: dict[str, Any]) -> None:
    """Let linear layers and experts hold codes, scales and zero points."""
    version = str(found.get("version") or found.get("format") or "gemm").lower()
    if version != "gemm":
        raise refused(model, f"awq in the version {version}", "it runs gemm")
    bits = found.get("bits", found.get("w_bit", 4))
    form = _Awq(bits, found.get("group_size", found.get("q_group_size", 128)))
    hold_linears(model, found, "awq", form, "qweight", _kept(found))


def hold_auto_round(model: Any, found: dict[str, Any]) -> None:
    """Hold AutoRound's weights as GPTQ's version 1 or as AWQ, whichever the checkpoint is packed like."""
    packing = str(found.get("packing_format") or found.get("backend") or "")
    if found.get("data_type", "int") != "int":
        raise refused(model, f"auto-round of {found['data_type']}", "it runs int")
    if packing.endswith("auto_awq"):
        hold_awq(model, {**found, "version": "gemm"})
    elif packing.endswith("auto_gptq"):
        hold_gptq(model, {**found, "checkpoint_format": "gptq", "desc_act": False})
    else:
        raise refused(model, f"auto-round packed as {packing or 'it does not say'}", "it runs auto_gptq and auto_awq")


def _kept(found: Mapping[str, Any]) -> Callable[[str], bool]:
    """A test for linear layers that are not quantized, as far as a config says it: heads and routers never are."""
    names = [*(found.get("modules_to_not_convert") or ()), "lm_head"]
    dropped = [rule[2:] for rule in found.get("dynamic") or {} if rule.startswith("-:")]

    def is_kept(layer: str) -> bool:
        is_router = layer.endswith((".gate", ".router", ".shared_expert_gate"))
        return is_router or any(name in layer for name in names) or any(re.match(rule, layer) for rule in dropped)

    return is_kept


@dataclass(frozen=True, slots=True)
class _Gptq(MatrixFormat):
    bits: int
    group: int
    is_ordered: bool
    """Groups are made of any inputs, which `g_idx` tells."""
    less: int
    """Zero points are stored so much too low."""

    def usual(self, rows: int, columns: int) -> dict[str, Stored]:
        groups = ceil(columns / self.group) if self.group > 0 else 1
        return {
            "qweight": Stored(torch.int32, (packed_size(columns, self.bits), rows)),
            "qzeros": Stored(torch.int32, (groups, packed_size(rows, self.bits))),
            "scales": Stored(torch.float16, (groups, rows)),
            "g_idx": Stored(torch.int32, (columns,)),
        }

    def why_not(self, rows: int, columns: int, stored: Mapping[str, Stored]) -> str | None:
        usual = self.usual(rows, columns)
        if not self.is_ordered and "g_idx" not in stored:
            del usual["g_idx"]
        return _why_not(self, usual, columns, stored, (2, 3, 4, 8))

    def read(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        if name == "g_idx" and not self.is_ordered:
            group = self.group if self.group > 0 else stored.numel()
            if not torch.equal(stored, torch.arange(stored.numel(), dtype=stored.dtype) // group):
                raise ModelError(
                    "its groups are not in order (g_idx), though its config has no desc_act", hint=OTHER_CHECKPOINT
                )
        return stored

    def expand(self, held: Held, whole: torch.Tensor) -> None:
        order = held["g_idx"] if self.is_ordered else None
        _expand_any(whole, held["qweight"], held["qzeros"], held["scales"], order, self.bits, self.less, False)


@dataclass(frozen=True, slots=True)
class _Awq(MatrixFormat):
    bits: int
    group: int

    def usual(self, rows: int, columns: int) -> dict[str, Stored]:
        groups = ceil(columns / self.group) if self.group > 0 else 1
        return {
            "qweight": Stored(torch.int32, (columns, packed_size(rows, self.bits))),
            "qzeros": Stored(torch.int32, (groups, packed_size(rows, self.bits))),
            "scales": Stored(torch.float16, (groups, rows)),
        }

    def why_not(self, rows: int, columns: int, stored: Mapping[str, Stored]) -> str | None:
        return _why_not(self, self.usual(rows, columns), columns, stored, (4,))

    def expand(self, held: Held, whole: torch.Tensor) -> None:
        _expand_any(whole, held["qweight"], held["qzeros"], held["scales"], None, self.bits, 0, True)


def _why_not(
    form: _Gptq | _Awq, usual: Mapping[str, Stored], columns: int, stored: Mapping[str, Stored], widths: Sequence[int]
) -> str | None:
    """Why tensors `stored` are not those of `form`, whose codes have one of `widths` bits."""
    if unknown := set(stored) - {*usual, "bias"}:
        return f"has {', '.join(sorted(unknown))}, which is not known"
    if form.bits not in widths:
        return f"has codes of {form.bits} bits"
    for name, expected in usual.items():
        one = stored.get(name)
        if one is None or one.shape != expected.shape:
            return f"has {name} in the shape {one and one.shape}, not {expected.shape}: another width or group"
    if columns % stored["scales"].shape[0]:
        return f"has {columns} inputs, which groups of {form.group} do not divide"
    return None if stored["scales"].dtype in _SCALE_TYPES else f"has scales of {stored['scales'].dtype}"


def _expand(
    whole: torch.Tensor,
    codes: torch.Tensor,
    zeros: torch.Tensor,
    scales: torch.Tensor,
    order: torch.Tensor | None,
    bits: int,
    less: int,
    awq: bool,
) -> None:
    """Fill `whole` (..., outputs, inputs); `order` tells the group of each input where groups are not in order."""
    mask, places = (1 << bits) - 1, _AWQ_ORDER if awq else None

    def weights(stack: slice, rows: slice) -> torch.Tensor:
        words = rows
        if rows.start is not None:
            words = slice(rows.start * bits // 32, min(rows.stop, whole.shape[-2]) * bits // 32)
        own = unpack(_part(codes, stack, words if awq else rows), bits, -1 if awq else -2, places)
        zero = ((unpack(_part(zeros, stack, words), bits, -1, places) + less) & mask).float()
        scale = _part(scales, stack, rows)
        if order is not None:
            groups = (order[stack] if order.dim() > 1 else order).long()
            index = groups[..., None].expand(own.shape)
            made = affine(own, zero.gather(-2, index), scale.gather(-2, index))
        else:
            made = affine(_grouped(own, scale.shape[-2]), zero[..., None, :], scale[..., None, :]).flatten(-3, -2)
        return made.transpose(-1, -2).contiguous()

    by_slices(whole, 32, weights)


@cache
def _random(bits: int, less: int, awq: bool, is_ordered: bool, is_grouped: bool, dtype: torch.dtype) -> Random:
    def random(stack: int, rows: int, columns: int, generator: torch.Generator) -> tuple[Any, ...]:
        groups = columns // 128 if is_grouped else 1
        shape = (columns, packed_size(rows, bits)) if awq else (packed_size(columns, bits), rows)
        order = random_groups(generator, groups, stack, columns)
        return (
            random_words(generator, stack, *shape),
            random_words(generator, stack, groups, packed_size(rows, bits)),
            random_scales(generator, dtype, stack, groups, rows),
            order if is_ordered else None,
            bits,
            less,
            awq,
        )

    return random


_expand_fused = fused(
    "expand_words(Tensor(a!) whole, Tensor codes, Tensor zeros, Tensor scales, Tensor? order, int bits, int less, "
    "bool awq) -> ()",
    _expand,
    lambda whole, codes, zeros, scales, order, bits, less, awq: _random(
        bits, less, awq, order is not None, scales.shape[-2] > 1, scales.dtype
    ),
    {
        **{f"GPTQ, {bits} bits": _random(bits, 1, False, False, True, torch.float16) for bits in (2, 3, 4, 8)},
        "GPTQ, 4 bits, desc_act": _random(4, 1, False, True, True, torch.float16),
        "GPTQ, 4 bits, a scale a row": _random(4, 0, False, False, False, torch.bfloat16),
        "AWQ": _random(4, 0, True, False, True, torch.float16),
    },
)


def _expand_any(
    whole: torch.Tensor, codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, *more: Any
) -> None:
    """Fill `whole` by a kernel, if that takes groups of this size."""
    is_usual = fills_units(whole.shape[-1], scales.shape[-2]) and whole.shape[-2] % 32 == 0
    (_expand_fused if is_usual else _expand)(whole, codes, zeros, scales, *more)


def _grouped(codes: torch.Tensor, groups: int) -> torch.Tensor:
    """Codes (..., inputs, outputs) as (..., groups, of each, outputs)."""
    return codes.reshape(*codes.shape[:-2], groups, -1, codes.shape[-1])


def _part(tensor: torch.Tensor, stack: slice, last: slice) -> torch.Tensor:
    """Part of a tensor of one matrix, or of a stack of them."""
    return tensor[..., last] if tensor.dim() == 2 else tensor[stack][..., last]
