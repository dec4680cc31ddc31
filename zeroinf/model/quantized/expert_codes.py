"""The weights of experts as codes that products read: numbers of four bits (MXFP4, NVFP4), or integers in groups.

Codes of an output lie side by side, those of the first inputs in the lowest bits of a byte. A group of them shares a
scale, and may share a zero point; what shares the scale of NVFP4 are all weights of a matrix of the checkpoint, of
which several may be joined along the outputs. Expansion of all of them is one call of an operator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from zeroinf.model.quantized.fp4 import expand_fp4
from zeroinf.model.quantized.integers import expand_integers

_GROUPS = (16, 32, 64, 128)
"""Inputs that share a scale, where kernels multiply by the codes of integers."""
_TOGETHER = 32
"""Inputs of which rows have a multiple there."""
_EXPAND: dict[str, Callable[..., None]] = {"expand_fp4": expand_fp4, "expand_integers": expand_integers}


@dataclass(frozen=True, slots=True)
class CodeKind:
    """What a product has to know of codes, beside their sizes."""

    bits: int
    group: int
    """Codes that share a scale."""
    scales: torch.dtype
    """uint8: exponents of two, 127 too high."""
    is_float: bool = False
    """Codes are numbers (E2M1)."""
    has_zeros: bool = False
    """A group has a zero point; else integers are half of their range too high."""
    shared: Literal["", "times", "divides"] = ""
    """What a float32 of each matrix does to the scales."""


def nvfp4_kind(columns: int, shared: Literal["times", "divides"]) -> CodeKind | None:
    """The kind of a matrix with so many columns in NVFP4; None where no kernel multiplies by it."""
    found = CodeKind(4, 16, torch.float8_e4m3fn, is_float=True, shared=shared)
    return None if columns % _TOGETHER else found


MXFP4 = CodeKind(4, 32, torch.uint8, is_float=True)


def integer_kind(
    bits: int, rows: int, columns: int, groups: int, scales: torch.dtype, *, has_zeros: bool
) -> CodeKind | None:
    """The kind of a matrix (rows, columns) in so many `groups` of columns; None where no kernel multiplies by it."""
    fills = columns % groups == 0 and columns % _TOGETHER == 0 and (rows * bits % 32 == 0 or not has_zeros)
    if bits != 4 or not fills or columns // groups not in _GROUPS:
        return None
    return CodeKind(bits, columns // groups, scales, has_zeros=has_zeros)


@dataclass(frozen=True, slots=True)
class ExpertCodes:
    """The weights of all experts in one of their products."""

    kind: CodeKind
    codes: torch.Tensor
    """(experts, outputs, bytes; uint8)."""
    scales: torch.Tensor
    """(experts, outputs, groups)."""
    zeros: torch.Tensor | None = None
    """(experts, outputs in words, groups; int32): codes of a group's outputs lie side by side in a word."""
    shared: torch.Tensor | None = None
    """(experts, matrices, 1; float32)."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Experts, outputs and inputs."""
        experts, outputs, size = self.codes.shape
        return experts, outputs, size * 8 // self.kind.bits

    def some(self, experts: slice) -> ExpertCodes:
        """Those of some experts."""
        zeros, shared = (None if one is None else one[experts] for one in (self.zeros, self.shared))
        return replace(self, codes=self.codes[experts], scales=self.scales[experts], zeros=zeros, shared=shared)

    def expansion(self, whole: torch.Tensor) -> tuple[str, tuple[Any, ...]]:
        """The operator that fills `whole` (experts, outputs, inputs) with the weights, and its arguments."""
        if not self.kind.is_float:
            return "expand_integers", (whole, self.codes.view(torch.int32), self.scales, self.zeros, None, 1.0)
        if self.shared is None:
            return "expand_fp4", (whole, self.codes, self.scales, None, False)
        matrices = self.shared.numel()
        parts = (one.view(matrices, -1, one.shape[-1]) for one in (whole, self.codes, self.scales))
        return "expand_fp4", (*parts, self.shared.flatten(), self.kind.shared == "divides")


def expand_experts(whole: torch.Tensor, codes: ExpertCodes) -> None:
    """Fill `whole` (experts, outputs, inputs) with the weights."""
    name, args = codes.expansion(whole)
    _EXPAND[name](*args)
