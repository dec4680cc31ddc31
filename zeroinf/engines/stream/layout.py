"""Where the tensors of a block lie in its one contiguous piece of memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from zeroinf.planner.memory import ALIGNMENT, PIECE_ALIGNMENT, round_up


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
class Layout:
    """The places of tensors in a piece of `nbytes` bytes."""

    places: tuple[Place, ...]
    nbytes: int


def lay_out(tensors: Iterable[torch.Tensor]) -> Layout:
    """One after the other, in the order given, each aligned; the whole is a multiple of PIECE_ALIGNMENT."""
    places, end = [], 0
    for tensor in tensors:
        place = Place(end, tensor.shape, tensor.dtype)
        places.append(place)
        end += round_up(place.nbytes, ALIGNMENT)
    return Layout(tuple(places), round_up(end, PIECE_ALIGNMENT))
