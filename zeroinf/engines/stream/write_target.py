"""The destination of a tensor within a piece in the wire format: written as it is, or encoded as codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zeroinf.engines.stream.codes import encode
from zeroinf.engines.stream.layout import CodedWeights, Layout, TensorLocation
from zeroinf.planner.memory import round_up


@dataclass(frozen=True, slots=True)
class WriteTarget:
    """A tensor's part of the piece `wire_piece` (uint8), which is laid out by `layout`. Codes are made on `device`."""

    layout: Layout
    location: TensorLocation
    wire_piece: torch.Tensor
    device: torch.device

    @property
    def shape(self) -> torch.Size:
        return self.location.shape

    @property
    def nbytes(self) -> int:
        """Bytes that are written, gaps left out."""
        coded, location = self._coded, self.location
        if coded is None:
            return location.nbytes
        elements = location.shape.numel()
        return coded.kind.nbytes(elements) + coded.kind.scale_bytes(elements)

    def write(self, value: torch.Tensor) -> None:
        """Write the whole tensor (contiguous, of its shape, any dtype)."""
        self.write_part(0, value.reshape(-1))

    def write_part(self, start: int, values: torch.Tensor) -> None:
        """Write `values` (one dimension, any dtype) from element `start` on.

        Where the tensor is coded, a group must begin there, and only the tensor's end may leave one unfinished.
        """
        coded = self._coded
        if coded is None:
            memory = self.layout.wire_location(self.location).view(self.wire_piece)
            memory.view(-1)[start : start + values.numel()] = values
            return
        first = self.location.offset // coded.dtype.itemsize + start
        last = first + round_up(values.numel(), coded.kind.group)
        codes = self.layout.codes(self.wire_piece)[coded.kind.nbytes(first) : coded.kind.nbytes(last)]
        scales = self.layout.scales(self.wire_piece)[first // coded.kind.group : last // coded.kind.group]
        encode(values, coded.dtype, coded.kind, codes, scales, self.device)

    @property
    def _coded(self) -> CodedWeights | None:
        """The codes of which this tensor has a part; None if it crosses as it is."""
        coded = self.layout.coded
        return coded if coded is not None and self.location.offset < coded.nbytes else None
