"""Where the tensors of a block lie in its one contiguous piece of memory, in full and as it crosses the link."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from zeroinf.engines.stream.codes import SCALE_DTYPE
from zeroinf.planner.memory import ALIGNMENT, PIECE_ALIGNMENT, round_up
from zeroinf.planner.wire import Codes


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor's place: `offset` in bytes from the start of the piece."""

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
class Coded:
    """The weights at the start of a piece that cross as codes: so many `elements` of `dtype`, gaps included."""

    kind: Codes
    elements: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """In full."""
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Layout:
    """The places of tensors in a piece of `nbytes` bytes, of which `end` are used.

    In full, weights that cross as codes come first. As it crosses the link, their codes lie there, then all that is not
    coded, as it is, then the scales. Without coded weights both are the same.
    """

    places: tuple[Place, ...]
    end: int
    coded: Coded | None = None

    @property
    def nbytes(self) -> int:
        return round_up(self.end, PIECE_ALIGNMENT)

    @property
    def crossing_bytes(self) -> int:
        """Bytes of the piece as it rests and crosses the link."""
        if self.coded is None:
            return self.nbytes
        kind, elements = self.coded.kind, self.coded.elements
        return round_up(self._scales_start + kind.scale_bytes(elements), PIECE_ALIGNMENT)

    def codes(self, crossing: torch.Tensor) -> torch.Tensor:
        """Of a piece as it crosses the link (uint8), the codes."""
        assert self.coded is not None
        return crossing[: self.coded.kind.nbytes(self.coded.elements)]

    def scales(self, crossing: torch.Tensor) -> torch.Tensor:
        """Of a piece as it crosses the link (uint8), the scales."""
        assert self.coded is not None
        start = self._scales_start
        return crossing[start : start + self.coded.kind.scale_bytes(self.coded.elements)].view(SCALE_DTYPE)

    def weights(self, piece: torch.Tensor) -> torch.Tensor:
        """Of a piece in full (uint8), what crosses as codes, in one dimension."""
        assert self.coded is not None
        return piece[: self.coded.nbytes].view(self.coded.dtype)

    def crossing_place(self, place: Place) -> Place:
        """Where a tensor that is not coded lies in a piece as it crosses the link."""
        return replace(place, offset=place.offset - self._coded_bytes + self._rest_start)

    def rest(self, piece: torch.Tensor) -> torch.Tensor:
        """Of a piece in full (uint8), the bytes that cross as they are."""
        return piece[self._coded_bytes : self.end]

    def crossing_rest(self, crossing: torch.Tensor) -> torch.Tensor:
        """The same in a piece as it crosses the link."""
        return crossing[self._rest_start : self._scales_start]

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
    """Those `coded` as `kind` first, else one after the other, in the order given, each aligned.

    Coded tensors are of one dtype. The whole is a multiple of PIECE_ALIGNMENT.
    """
    is_coded = coded or [False] * len(tensors)
    places: dict[int, Place] = {}
    end, first = 0, None
    for index in sorted(range(len(tensors)), key=lambda index: not is_coded[index]):
        place = places[index] = Place(end, tensors[index].shape, tensors[index].dtype)
        end += round_up(place.nbytes, ALIGNMENT)
        if is_coded[index]:
            assert kind is not None
            first = Coded(kind, end // place.dtype.itemsize, place.dtype)
    return Layout(tuple(places[index] for index in range(len(tensors))), end, first)
