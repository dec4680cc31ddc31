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
from zeroinf.model.quantized.expert_codes import ExpertCodes
from zeroinf.planner.wire import EXPANDED_AT_ONCE_BYTES, MOST_CODED_ROWS, Codes


@dataclass(frozen=True, slots=True)
class WeightMatrix:
    """Weights (outputs, inputs) or (experts, outputs, inputs) as they rest: numbers, or codes in groups of inputs."""

    data: torch.Tensor
    """Codes (uint8), or the weights themselves, of `shape` with any strides of outputs and inputs."""
    scales: torch.Tensor | None
    shape: tuple[int, ...]
    bits: int
    group: int
    of_checkpoint: ExpertCodes | None = None
    """The codes as a checkpoint has them: of two inputs side by side, the first is in the lower bits of a byte."""

    @property
    def is_float(self) -> bool:
        """Whether codes are numbers (E2M1)."""
        return self.of_checkpoint is not None and self.of_checkpoint.kind.is_float


def matrix_of(codes: ExpertCodes) -> WeightMatrix:
    """The codes of experts of a checkpoint."""
    return WeightMatrix(codes.codes, codes.scales, codes.shape, codes.kind.bits, codes.kind.group, codes)


def experts_at_once(weight: WeightMatrix) -> int:
    """Of how many experts the codes of `weight` are expanded before they are multiplied."""
    count, outputs, inputs = weight.shape
    return min(count, max(1, EXPANDED_AT_ONCE_BYTES // (outputs * inputs * 2)))


Product = Callable[[torch.Tensor, WeightMatrix, torch.Tensor | None], torch.Tensor]
"""Inputs (rows, inputs) by a matrix (outputs, inputs), and a bias: (rows, outputs)."""
Decode = Callable[[torch.Tensor, torch.Tensor, Codes, torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class _AtRest:
    """A weight in one of the pieces that it may be handed."""

    codes: torch.Tensor
    scales: torch.Tensor
    address: int
    matrix: WeightMatrix | None
    """None where groups do not lie along rows."""


class CodedWeight(torch.Tensor):
    """Stands for the weight at `location` of `layout`."""

    _is_param = True
    _layout: Layout
    location: TensorLocation
    _kind: Codes
    _is_passing: bool
    _decode: Decode
    _product: Product
    _whole: torch.Tensor | None
    _at_rest: _AtRest | None
    _is_expanded: bool
    _known: dict[int, _AtRest]

    @staticmethod
    def __new__(
        cls,
        layout: Layout,
        location: TensorLocation,
        slot: torch.Tensor | None,
        decode: Decode,
        product: Product,
        device: torch.device,
        is_passing: bool = False,
    ) -> CodedWeight:
        """In full it lies at the beginning of `slot` (uint8), written by `decode`; `product` runs on codes.

        `is_passing`: others use the same slot, so that it lies there for a product and no longer. Without a slot, what
        asks for it in full gets it in memory of its own.
        """
        assert layout.coded is not None
        assert slot is not None or is_passing
        own = make_wrapper(cls, location.shape, location.dtype, device)
        own._layout, own.location, own._decode, own._product = layout, location, decode, product
        own._kind, own._is_passing, own._at_rest, own._is_expanded = layout.coded.kind, is_passing, None, False
        own._known = {}  # by addresses of pieces
        own._whole = None if slot is None else slot[: own._elements * location.dtype.itemsize].view(location.dtype)
        return own

    def hold(self, wire_piece: torch.Tensor) -> None:
        """Stand for what lies in `wire_piece` (uint8, as it crossed the link) from now on."""
        address = wire_piece.data_ptr()
        known = self._known.get(address)
        if known is None:
            known = self._known[address] = self._found(wire_piece)
        self._at_rest, self._is_expanded = known, False

    def data_ptr(self) -> int:
        """Where its codes lie: CUDA graphs of layers serve those addresses alone."""
        assert self._at_rest is not None
        return self._at_rest.address

    def matrix(self) -> WeightMatrix | None:
        """The codes, where groups lie along rows; else None."""
        assert self._at_rest is not None
        return self._at_rest.matrix

    def full(self) -> torch.Tensor:
        """The weight, in its place in the expanded slot, or in memory of its own."""
        if self._is_passing or self._whole is None:
            return self._expand(torch.empty(self._elements, dtype=self.location.dtype, device=self.device))
        # What a CUDA graph captures has not run, and must not depend on what has.
        if not (self._whole.is_cuda and torch.cuda.is_current_stream_capturing()):
            if self._is_expanded:
                return self._in(self._whole)
            self._is_expanded = True
        return self._expand(self._whole)

    def in_passing(self) -> torch.Tensor:
        """The weight in the slot, where another may take its place when that is asked for."""
        return self.full() if self._whole is None else self._expand(self._whole)

    @property
    def _elements(self) -> int:
        """Of whole groups."""
        return -(-self.location.shape.numel() // self._kind.group) * self._kind.group

    def _expand(self, whole: torch.Tensor) -> torch.Tensor:
        """The weight in `whole`, which is filled."""
        assert self._at_rest is not None
        self._decode(self._at_rest.codes, self._at_rest.scales, self._kind, whole)
        return self._in(whole)

    def _in(self, whole: torch.Tensor) -> torch.Tensor:
        """The weight in memory that begins with it."""
        return whole[: self.location.shape.numel()].view(self.location.shape)

    def _found(self, piece: torch.Tensor) -> _AtRest:
        kind, shape = self._kind, self.location.shape
        first = self.location.offset // self.location.dtype.itemsize // kind.group
        groups, of_group = -(-shape.numel() // kind.group), kind.nbytes(kind.group)
        codes = self._layout.codes(piece)[first * of_group : (first + groups) * of_group]
        scales = self._layout.scales(piece)[first : first + groups]
        matrix = WeightMatrix(codes, scales, tuple(shape), kind.bits, kind.group)
        return _AtRest(codes, scales, codes.data_ptr(), None if shape[-1] % kind.group else matrix)

    def _linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        matrix = self.matrix() if len(self.location.shape) == 2 else None
        rows = x.numel() // x.shape[-1]
        if matrix is None or x.dtype != self.location.dtype or not 0 < rows <= MOST_CODED_ROWS[self._kind.bits]:
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
            if not _is_fact(func):
                args, given = replaced(CodedWeight, CodedWeight.full, (args, dict(given)))
            return func(*args, **given)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        full = replaced(CodedWeight, CodedWeight.full, (args, dict(kwargs or {})))
        return func(*full[0], **full[1])


def _is_fact(func: Any) -> bool:
    """Whether `func` reads a fact about a tensor, and no elements of it."""
    if getattr(func, "__name__", "") == "__get__":
        return func.__self__.__name__ not in ("T", "mT", "H", "mH", "data", "real", "imag")
    return func in (torch.Tensor.dim, torch.Tensor.size, torch.Tensor.stride, torch.Tensor.numel)
