"""Computes where the tensors of a block lie in its contiguous piece of memory, both in full and in the wire format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from zeroinf.engines.stream.codes import SCALE_DTYPE
from zeroinf.planner.memory import ALIGNMENT, PIECE_ALIGNMENT, round_up
from zeroinf.planner.wire import Codes


@dataclass(frozen=True, slots=True)
class TensorLocation:
    """The location of a tensor: `offset` in bytes from the start of the piece, with its shape and dtype."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def view(self, piece: torch.Tensor) -> torch.Tensor:
        """The tensor itself, in `piece` (uint8, one dimension)."""
        return piece[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True)
class CodedWeights:
    """The weights at the start of a piece that cross as codes: so many `elements` of `dtype`, gaps included."""

    kind: Codes
    elements: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the piece in full, before it is quantized."""
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Layout:
    """The places of tensors in a piece of `nbytes` bytes, of which `end` are used.

    In full, weights that cross as codes come first. As it crosses the link, their codes lie there, then all that is not
    coded, as it is, then the scales. Without coded weights both are the same.
    """

    locations: tuple[TensorLocation, ...]
    end: int
    coded: CodedWeights | None = None

    @property
    def nbytes(self) -> int:
        return round_up(self.end, PIECE_ALIGNMENT)

    @property
    def wire_bytes(self) -> int:
        """Bytes of the piece as it rests and crosses the link."""
        if self.coded is None:
            return self.nbytes
        kind, elements = self.coded.kind, self.coded.elements
        return round_up(self._scales_start + kind.scale_bytes(elements), PIECE_ALIGNMENT)

    def codes(self, wire_piece: torch.Tensor) -> torch.Tensor:
        """The codes in a piece as it crosses the link (uint8)."""
        assert self.coded is not None
        return wire_piece[: self.coded.kind.nbytes(self.coded.elements)]

    def scales(self, wire_piece: torch.Tensor) -> torch.Tensor:
        """The scales in a piece as it crosses the link (uint8)."""
        assert self.coded is not None
        start = self._scales_start
        return wire_piece[start : start + self.coded.kind.scale_bytes(self.coded.elements)].view(SCALE_DTYPE)

    def weights(self, piece: torch.Tensor) -> torch.Tensor:
        """The weights of a piece in full (uint8) that cross as codes, in one dimension."""
        assert self.coded is not None
        return piece[: self.coded.nbytes].view(self.coded.dtype)

    def is_coded(self, location: TensorLocation) -> bool:
        """Whether the tensor there crosses the link as codes."""
        return location.offset < self._coded_bytes

    def wire_location(self, location: TensorLocation) -> TensorLocation:
        """The location of a tensor that is not quantized in a piece as it crosses the link."""
        return replace(location, offset=location.offset - self._coded_bytes + self._rest_start)

    @property
    def rest_range(self) -> range:
        """The bytes of a piece in full that cross as they are."""
        return range(self._coded_bytes, self.end)

    def wire_rest(self, wire_piece: torch.Tensor) -> torch.Tensor:
        """The bytes of a piece as it crosses the link that are not quantized."""
        return wire_piece[self._rest_start : self._scales_start]

    def entries(self, count: int) -> tuple[tuple[int, int], ...]:
        """Where the first of `count` equal entries of each tensor lies in a piece as it crosses the link, and its
        bytes; the others follow it. Of coded tensors these are codes, and scales by themselves."""
        found = list[tuple[int, int]]()
        for location in self.locations:
            if self.coded is None:
                found.append((location.offset, location.nbytes // count))
            elif location.offset >= self._coded_bytes:
                found.append((self.wire_location(location).offset, location.nbytes // count))
            else:
                kind, size = self.coded.kind, location.dtype.itemsize
                first, each = location.offset // size, location.shape.numel() // count
                assert each % kind.group == 0
                found.append((kind.nbytes(first), kind.nbytes(each)))
                found.append((self._scales_start + kind.scale_bytes(first), kind.scale_bytes(each)))
        return tuple(found)

    @property
    def _coded_bytes(self) -> int:
        return self.coded.nbytes if self.coded is not None else 0

    @property
    def _rest_start(self) -> int:
        return self.coded.kind.nbytes(self.coded.elements) if self.coded is not None else 0

    @property
    def _scales_start(self) -> int:
        return self._rest_start + self.end - self._coded_bytes


def lay_out(tensors: Sequence[torch.Tensor], kind: Codes | None = None, coded: Sequence[bool] = ()) -> Layout:
    """Lay tensors out in one piece: those `coded` as `kind` first, else one after the other, in the order given, each
    aligned.

    Coded tensors are of one dtype. The whole is a multiple of PIECE_ALIGNMENT.
    """
    is_coded = coded or [False] * len(tensors)
    locations: dict[int, TensorLocation] = {}
    end, first = 0, None
    for index in sorted(range(len(tensors)), key=lambda index: not is_coded[index]):
        location = locations[index] = TensorLocation(end, tensors[index].shape, tensors[index].dtype)
        end += round_up(location.nbytes, ALIGNMENT)
        if is_coded[index]:
            assert kind is not None
            first = CodedWeights(kind, end // location.dtype.itemsize, location.dtype)
    return Layout(tuple(locations[index] for index in range(len(tensors))), end, first)
