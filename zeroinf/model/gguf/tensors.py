"""Maps the tensors of GGUF files into memory. No data is read before it is used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from zeroinf.model.gguf.header import GgufTensor, read_gguf
from zeroinf.model.mapped_files import map_file


def open_tensors(parts: Sequence[Path]) -> dict[str, tuple[Path, torch.Tensor]]:
    """The tensors of all `parts` by name, each with its file, not to be written to.

    Numbers have their shape and dtype; quantized rows are bytes: (..., bytes of a row) uint8. Raises ModelError as
    `read_gguf` does.
    """
    header = read_gguf(parts[0])
    memory = {path: map_file(path) for path in {tensor.path for tensor in header.tensors.values()}}
    return {name: (tensor.path, _view(tensor, memory[tensor.path])) for name, tensor in header.tensors.items()}


def _view(tensor: GgufTensor, memory: torch.Tensor) -> torch.Tensor:
    data = memory[tensor.offset : tensor.offset + tensor.nbytes]
    return data.view(getattr(torch, tensor.held_dtype)).view(tensor.held_shape)
