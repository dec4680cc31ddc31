"""Maps the tensors of GGUF files into memory. No data is read before it is used."""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from zeroinf.model.gguf.header import GgufTensor, read_gguf


def open_tensors(parts: Sequence[Path]) -> dict[str, tuple[Path, torch.Tensor]]:
    """The tensors of all `parts` by name, each with its file, not to be written to.

    Numbers have their shape and dtype; quantized rows are bytes: (..., bytes of a row) uint8. Raises ModelError as
    `read_gguf` does.
    """
    header = read_gguf(parts[0])
    memory = {path: _mapped(path) for path in {tensor.path for tensor in header.tensors.values()}}
    return {name: (tensor.path, _view(tensor, memory[tensor.path])) for name, tensor in header.tensors.items()}


def _mapped(path: Path) -> torch.Tensor:
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns of memory that is read only, as this shall be
        return torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=torch.uint8)


def _view(tensor: GgufTensor, memory: torch.Tensor) -> torch.Tensor:
    data = memory[tensor.offset : tensor.offset + tensor.nbytes]
    return data.view(getattr(torch, tensor.held_dtype)).view(tensor.held_shape)
