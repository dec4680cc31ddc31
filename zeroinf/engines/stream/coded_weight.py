"""A weight that rests as codes: products with it run on the codes, and whatever else reads it gets it in full.

It stands in a module in the place of its parameter, with the parameter's shape and dtype, and holds no memory. What it
reads lies in the piece that its block was handed last; in full it lies in the expanded slot, made there when something
first asks for it in a visit of the block. So no use of a weight can see another block's, and a model whose code
multiplies in ways of its own computes what it would with weights in full.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

from zeroinf.compat.subclasses import as_plain_tensors, make_wrapper, replaced
from zeroinf.engines.stream.layout import Layout, TensorLocation
from zeroinf.planner.wire import Codes


@dataclass(frozen=True, slots=True)
class Matrix:
    """Weights (outputs, inputs) or (experts, outputs, inputs) as they rest: numbers, or codes in groups of inputs."""

    data: torch.Tensor
    """Codes (uint8), or the weights themselves."""
    scales: torch.Tensor | None
    shape: tuple[int, ...]
    bits: int
    group: int


Product = Callable[[torch.Tensor, Matrix, torch.Tensor | None], torch.Tensor]
"""Inputs (rows, inputs) by a matrix (outputs, inputs), and a bias: (rows, outputs)."""
Decode = Callable[[torch.Tensor, torch.Tensor, Codes, torch.Tensor], None]

MOST_ROWS = 512
"""Of more rows, a product with the weight in full is faster, expansion included (`scripts/bench-products`)."""


class CodedWeight(torch.Tensor):
    """Stands for the weight at `location` of `layout`."""

    _is_param = True
    _layout: Layout
    _location: TensorLocation
    _slot: torch.Tensor
    _decode: Decode
    _product: Product
    _piece: torch.Tensor | None
    _is_expanded: bool
    _matrices: dict[int, Matrix]

    @staticmethod
    def __new__(
        cls, layout: Layout, location: TensorLocation, slot: torch.Tensor, decode: Decode, product: Product
    ) -> CodedWeight:
        """In full it lies in `slot` (uint8, laid out as `layout`), written by `decode`; `product` runs on codes."""
        own = make_wrapper(cls, location.shape, location.dtype, slot.device)
        own._layout, own._location, own._slot, own._decode, own._product = layout, location, slot, decode, product
        own._piece, own._is_expanded, own._matrices = None, False, {}
        return own

    def hold(self, wire_piece: torch.Tensor) -> None:
        """Stand for what lies in `wire_piece` (uint8, as it crossed the link) from now on."""
        self._piece, self._is_expanded = wire_piece, False

    def data_ptr(self) -> int:
        """Where its codes lie: CUDA graphs of layers serve those addresses alone."""
        assert self._piece is not None
        return self._parts(self._piece)[0].data_ptr()

    def matrix(self) -> Matrix | None:
        """The codes, where groups lie along rows; else None."""
        coded, piece = self._layout.coded, self._piece
        assert coded is not None and piece is not None
        shape = tuple(self._location.shape)
        if shape[-1] % coded.kind.group:
            return None
        found = self._matrices.get(piece.data_ptr())
        if found is None:
            codes, scales = self._parts(piece)
            found = Matrix(codes, scales, shape, coded.kind.bits, coded.kind.group)
            self._matrices[piece.data_ptr()] = found
        return found

    def full(self) -> torch.Tensor:
        """The weight, in the expanded slot."""
        coded, piece = self._layout.coded, self._piece
        assert coded is not None and piece is not None
        # What a CUDA graph captures has not run, and must not depend on what has.
        is_captured = piece.is_cuda and torch.cuda.is_current_stream_capturing()
        if is_captured or not self._is_expanded:
            codes, scales = self._parts(piece)
            start = self._location.offset // coded.dtype.itemsize
            whole = self._layout.weights(self._slot)[start : start + scales.numel() * coded.kind.group]
            self._decode(codes, scales, coded.kind, whole)
            self._is_expanded |= not is_captured
        return self._location.view(self._slot)

    def _parts(self, piece: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        coded = self._layout.coded
        assert coded is not None
        first = self._location.offset // coded.dtype.itemsize // coded.kind.group
        groups = -(-self._location.shape.numel() // coded.kind.group)
        of_group = coded.kind.nbytes(coded.kind.group)
        codes = self._layout.codes(piece)[first * of_group : (first + groups) * of_group]
        return codes, self._layout.scales(piece)[first : first + groups]

    def _linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        matrix = self.matrix() if len(self._location.shape) == 2 else None
        rows = x.numel() // x.shape[-1]
        if matrix is None or x.dtype != self._location.dtype or not 0 < rows <= MOST_ROWS:
            return linear(x, self.full(), bias)
        out = self._product(x.reshape(rows, x.shape[-1]), matrix, bias)
        return out.view(*x.shape[:-1], out.shape[-1])

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is linear:
            weight = args[1] if len(args) > 1 else given["weight"]
            x = args[0] if args else given["input"]
            if isinstance(weight, cls) and not isinstance(x, cls):
                return weight._linear(x, args[2] if len(args) > 2 else given.get("bias"))
        with as_plain_tensors():
            return func(*args, **given)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        full = replaced(CodedWeight, CodedWeight.full, (args, dict(kwargs or {})))
        return func(*full[0], **full[1])
