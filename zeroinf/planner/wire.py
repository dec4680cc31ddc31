"""Wire formats: the weights of a block that are stored and transferred as codes of a few bits, and their size in
bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from zeroinf.model.anatomy import TensorSpec

Wire = Literal["model", "int8", "int4"]
"""`model`: weights cross as the model has them, without loss."""

SCALE_BYTES = 2

# What has fewer elements than this part of its block's largest weight stays as it is: it would save next to nothing.
_WORTHWHILE = 256


@dataclass(frozen=True, slots=True)
class Codes:
    """Weights as codes of `bits` bits; each `group` of them, as they lie in memory, share a scale."""

    bits: int
    group: int
    is_float: bool = False
    """Codes are numbers (E2M1) and scales powers of two, in a byte each: MXFP4."""

    def nbytes(self, elements: int) -> int:
        """Bytes of so many codes, whole groups, without their scales."""
        return elements * self.bits // 8

    def scale_bytes(self, elements: int) -> int:
        return elements // self.group * (1 if self.is_float else SCALE_BYTES)


CODES: dict[Wire, Codes] = {"int8": Codes(8, 64), "int4": Codes(4, 32)}
"""The lossy formats. What their groups cost in quality is measured in docs/decisions/0009-wire-formats.md."""

MXFP4 = Codes(4, 32, is_float=True)
"""Of checkpoints, whose experts are multiplied as codes."""

MOST_CODED_ROWS = {4: 256, 8: 64}
"""Dense products of more rows are faster with the weight in full, expansion included (`scripts/bench-products`); by the
bits of codes."""
MOST_ROWS_BY_EXPERT = {4: 1 << 62, 8: 40, 16: 40}
"""Likewise by expert, of more rows on average of all experts: never of four bits, where what torch gains with a
thousand rows each is as much as expansion takes. Of 16 bits are weights in full."""
MOST_MXFP4_ROWS_BY_EXPERT = 80
"""The same of MXFP4, of which some experts after the others are expanded: gpt-oss-120b's took an H200 4.6 ms as codes
and 4.95 in full with 65 rows each, 7.1 and 6.1 with 130."""
EXPANDED_AT_ONCE_BYTES = 512 << 20
"""Weights of so many bytes are expanded together then."""


def experts_are_expanded(kind: Codes) -> bool:
    """Whether experts' weights that cross as codes of `kind` are ever in full, so that they need a place for it."""
    return kind.bits != 4


def is_coded(tensors: Sequence[TensorSpec], dtype: str, wire: Wire) -> list[bool]:
    """Tell for each of a block's tensors whether it is quantized: the large weights are. `dtype` is the model's.

    Norms, biases, buffers, weights kept in another dtype and those with short rows (convolutions, states) do not.
    """
    if wire == "model":
        return [False] * len(tensors)
    fitting = [
        not t.is_buffer and t.dtype == dtype and len(t.shape) > 1 and t.shape[-1] >= CODES[wire].group for t in tensors
    ]
    largest = max((t.numel for t, fits in zip(tensors, fitting, strict=True) if fits), default=0)
    return [fits and t.numel * _WORTHWHILE >= largest for t, fits in zip(tensors, fitting, strict=True)]
