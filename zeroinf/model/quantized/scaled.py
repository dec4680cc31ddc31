"""Checkpoints of compressed-tensors and of NVIDIA's ModelOpt: integer, FP8 or FP4 codes with scales.

Layouts are those of the package compressed-tensors (`compressors`) and of ModelOpt's exported checkpoints. The stored
tensors of a layer determine how it is read. Scales of activations are ignored: activations stay in the model's dtype.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import torch

from zeroinf.model.quantized.expansion import Held, refused
from zeroinf.model.quantized.expert_codes import MXFP4, integer_kind, nvfp4_kind
from zeroinf.model.quantized.fp4 import expand_fp4
from zeroinf.model.quantized.fp8 import expand_fp8
from zeroinf.model.quantized.integers import code_bits, expand_integers
from zeroinf.model.quantized.linears import Coded, MatrixFormat, Stored, hold_linears

_OF_ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "k_scale", "v_scale")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def hold_scaled(model: Any, found: Mapping[str, Any]) -> None:
    """Let linear layers and experts hold what a checkpoint of compressed-tensors has of their weights."""
    groups = list((found.get("config_groups") or {}).values())
    schemes = [group["weights"] for group in groups if group.get("weights")]
    what = "compressed-tensors"
    if not schemes:
        raise refused(model, what, "its config names no weights")
    kept = _matches(found.get("ignore") or ())
    usual = _Scaled(
        bits=schemes[0].get("num_bits", 8),
        is_float=schemes[0].get("type", "int") == "float",
        group=schemes[0].get("group_size"),
        is_symmetric=schemes[0].get("symmetric", True),
    )
    hold_linears(model, found, what, usual, "weight_scale", kept)


def hold_modelopt(model: Any, found: Mapping[str, Any]) -> None:
    """Let linear layers and experts hold what a checkpoint of ModelOpt has of their weights."""
    algorithm = found.get("quant_algo")
    if algorithm not in ("NVFP4", "FP8"):
        raise refused(model, f"modelopt with {algorithm}", "it runs NVFP4 and FP8")
    if found.get("kv_cache_quant_algo") not in (None, "FP8"):
        raise refused(model, f"modelopt with a KV cache in {found['kv_cache_quant_algo']}", "only weights expand")
    names = [*(found.get("ignore") or ()), *(found.get("exclude_modules") or ()), "lm_head"]
    kept = _matches(
        [name if name.startswith("re:") else "re:" + re.escape(name).replace(r"\*", ".*") for name in names]
    )
    form = _Scaled(bits=4 if algorithm == "NVFP4" else 8, is_float=True, group=16, is_symmetric=True, is_modelopt=True)
    hold_linears(model, found, "modelopt", form, "weight_scale", kept)


def _matches(names: Sequence[str]) -> Callable[[str], bool]:
    """Whether a layer is one of `names`, of which some are patterns, or a router."""

    def is_one(layer: str) -> bool:
        if layer.endswith((".gate", ".router", ".shared_expert_gate")):
            return True
        return any(re.match(name[3:], layer) if name.startswith("re:") else name == layer for name in names)

    return is_one


@dataclass(frozen=True, slots=True)
class _Scaled(MatrixFormat):
    """A weight (rows, columns) as codes, with a scale for a group of columns, a row, a block, or all of it."""

    bits: int
    is_float: bool
    group: int | None
    is_symmetric: bool
    is_modelopt: bool = False

    def usual(self, rows: int, columns: int) -> dict[str, Stored]:
        groups = columns // self.group if self.group and self.group > 0 else 1
        found = {"weight_scale": Stored(torch.bfloat16, (rows, groups))}
        if self.is_float and self.bits == 4:
            found["weight_scale"] = Stored(torch.float8_e4m3fn, (rows, columns // 16))
            if self.group == 32:
                codes = Stored(torch.uint8, (rows, columns // 2))
                return {"weight_packed": codes, "weight_scale": Stored(torch.uint8, (rows, columns // 32))}
            named = ("weight", "weight_scale_2") if self.is_modelopt else ("weight_packed", "weight_global_scale")
            found[named[0]] = Stored(torch.uint8, (rows, columns // 2))
            found[named[1]] = Stored(torch.float32, () if self.is_modelopt else (1,))
        elif self.is_float:
            found["weight"] = Stored(torch.float8_e4m3fn, (rows, columns))
            found["weight_scale"] = Stored(torch.float32, () if self.is_modelopt else (rows, groups))
        else:
            found["weight_packed"] = Stored(torch.int32, (rows, ceil(columns * self.bits / 32)))
            if not self.is_symmetric:
                found["weight_zero_point"] = Stored(torch.int32, (ceil(rows * self.bits / 32), groups))
        return found

    def is_needed(self, name: str) -> bool:
        return name not in (*_OF_ACTIVATIONS, "weight_shape", "bias")

    def why_not(self, rows: int, columns: int, stored: Mapping[str, Stored]) -> str | None:
        known = {"weight", "weight_packed", "weight_scale", "weight_scale_2", "weight_global_scale"}
        needed = {name: one for name, one in stored.items() if self.is_needed(name)}
        if unknown := set(needed) - known - {"weight_zero_point", "weight_g_idx"}:
            return f"has {', '.join(sorted(unknown))}, which is not known"
        codes = needed.get("weight_packed") or needed.get("weight")
        if codes is None:
            return "has scales and no weight"
        kinds = {
            torch.int8: (rows, columns), torch.float8_e4m3fn: (rows, columns), torch.uint8: (rows, columns // 2)
        }  # fmt: skip
        if codes.dtype == torch.int32:
            if codes.shape[0] != rows or code_bits(codes.shape, columns) not in (2, 4, 8):
                return f"has codes of {code_bits(codes.shape, columns)} bits in the shape {codes.shape}"
        elif codes.dtype not in kinds or codes.shape != kinds[codes.dtype]:
            return f"has codes of {codes.dtype} in the shape {codes.shape}"
        scales = needed["weight_scale"]
        if codes.dtype == torch.uint8:
            return self._why_not_fp4(rows, columns, needed)
        if scales.dtype not in _FLOATS:
            return f"has scales of {scales.dtype}"
        down, across = (*scales.shape, 1, 1)[:2] if scales.shape else (1, 1)
        divides = rows % down == 0 and columns % across == 0
        if len(scales.shape) > 2 or not divides or (down not in (1, rows) and "weight_zero_point" in needed):
            return f"has scales in the shape {scales.shape}"
        if "weight_g_idx" in needed and (needed["weight_g_idx"].shape != (columns,) or down != rows):
            return "has groups in an order of their own, and scales of another shape"
        zeros = needed.get("weight_zero_point")
        words = ceil(rows * code_bits(codes.shape, columns) / 32) if codes.dtype == torch.int32 else 0
        packed = Stored(torch.int32, (words, across)), Stored(torch.int8, scales.shape)
        return (
            None if zeros is None or zeros in packed else f"has zero points of {zeros.dtype} in the shape {zeros.shape}"
        )

    def _why_not_fp4(self, rows: int, columns: int, stored: Mapping[str, Stored]) -> str | None:
        scales = stored["weight_scale"]
        of_all = stored.get("weight_global_scale") or stored.get("weight_scale_2")
        expected = (torch.float8_e4m3fn, 16) if of_all is not None else (torch.uint8, 32)
        if (scales.dtype, scales.shape) != (expected[0], (rows, columns // expected[1])) or columns % expected[1]:
            return f"has scales of {scales.dtype} in the shape {scales.shape}"
        return None if "weight_zero_point" not in stored else "has codes of four bits with zero points"

    def coded(self, rows: int, columns: int, stored: Mapping[str, Stored]) -> Coded | None:
        name = "weight_packed" if "weight_packed" in stored else "weight"
        codes, scales, names = stored[name], stored["weight_scale"], {"blocks": name, "scales": "weight_scale"}
        if codes.dtype == torch.uint8:
            of_all = next((one for one in ("weight_global_scale", "weight_scale_2") if one in stored), None)
            if of_all is None:
                return Coded(MXFP4, names)
            way: Literal["divides", "times"] = "divides" if of_all == "weight_global_scale" else "times"
            kind = nvfp4_kind(columns, way) if stored[of_all].dtype == torch.float32 else None
            return None if kind is None else Coded(kind, {**names, "shared": of_all})
        if codes.dtype != torch.int32 or "weight_g_idx" in stored or scales.shape[:-1] != (rows,):
            return None
        bits, groups, zeros = code_bits(codes.shape, columns), scales.shape[-1], "weight_zero_point" in stored
        found = integer_kind(bits, rows, columns, groups, scales.dtype, has_zeros=zeros)
        names |= {"zeros": "weight_zero_point"} if zeros else {}
        return None if found is None else Coded(found, names)

    def expand(self, held: Held, whole: torch.Tensor) -> None:
        codes = held.get("weight_packed", held.get("weight"))
        assert codes is not None
        if codes.dtype == torch.uint8:
            _expand_fp4(held, codes, whole)
            return
        scales = _as_matrix(held["weight_scale"], stacked=whole.dim() > 2)
        expand_scaled(whole, codes, scales, held.get("weight_zero_point"), held.get("weight_g_idx"))


def expand_scaled(
    whole: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    block: tuple[int, int] | None = None,
) -> None:
    """Fill `whole` (..., rows, columns) with integer or FP8 codes, and scales (..., blocks down, blocks across) of
    `block` rows and columns, of which the last may be smaller; None where blocks are equal."""
    (rows, columns), (down, across) = whole.shape[-2:], scales.shape[-2:]
    height, width = block or (rows // down, columns // across)
    if codes.dtype == torch.float8_e4m3fn and order is None and zeros is None:
        expand_fp8(whole, codes, scales, height, width)
        return
    if rows % down or columns % across:
        scales = scales.repeat_interleave(height, -2)[..., :rows, :].repeat_interleave(width, -1)[..., :columns]
    expand_integers(whole, codes, scales, zeros, order)


def _as_matrix(scales: torch.Tensor, stacked: bool) -> torch.Tensor:
    """Scales as (..., blocks down, blocks across)."""
    lead = scales.shape[:1] if stacked else ()
    inner = scales.shape[len(lead) :]
    return scales.reshape(*lead, *((*inner, 1, 1)[:2] if inner else (1, 1)))


def _expand_fp4(held: Held, codes: torch.Tensor, whole: torch.Tensor) -> None:
    """NVFP4, of which 16 weights share a scale in FP8 and all of them one in float32, or MXFP4: 32 a power of two."""
    of_all = next((held[name] for name in ("weight_global_scale", "weight_scale_2") if name in held), None)
    if of_all is not None:
        of_all = of_all.float().reshape(-1)
    expand_fp4(whole, codes, held["weight_scale"], of_all, "weight_global_scale" in held)
