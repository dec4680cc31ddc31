"""Maps files of weights into memory: no data is read before it is used, and what is read is memory that the system can
take back.

Maps are for reading alone: those that may be written to, as safetensors makes them for torch, are refused by the system
where a file is larger than its memory.
"""

from __future__ import annotations

import json
import mmap
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "C64": "complex64",
}
"""torch's names of the types that safetensors has; of others only the shape is of interest."""


def map_file(file: Path) -> torch.Tensor:
    """All of `file` (uint8), not to be written to."""
    import torch

    with file.open("rb") as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns of memory that is read only, as this shall be
        return torch.frombuffer(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ), dtype=torch.uint8)


def map_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors `file` by name, not to be written to; of dtypes that torch does not have, the bytes.

    Raises SafetensorError for a file that is damaged.
    """
    import torch
    from safetensors import safe_open

    with safe_open(file, framework="np"):  # which checks it
        memory = map_file(file)
    length, header = _header(file)
    found = dict[str, torch.Tensor]()
    for name, held in header.items():
        start, end = (8 + length + offset for offset in held["data_offsets"])
        data, kind = memory[start:end], DTYPES.get(held["dtype"])
        if kind is not None:
            dtype: torch.dtype = getattr(torch, kind)
            aligned = start % dtype.itemsize == 0
            data = (data if aligned else data.clone()).view(dtype).view(held["shape"])
        found[name] = data
    return found


def data_offsets(file: Path) -> dict[str, tuple[int, int]]:
    """Where the data of each tensor of a safetensors `file` begins and ends in it, in bytes."""
    length, header = _header(file)
    first = 8 + length
    return {name: (first + held["data_offsets"][0], first + held["data_offsets"][1]) for name, held in header.items()}


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """The length of the header of a safetensors `file`, and what it says of each tensor."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return length, header
