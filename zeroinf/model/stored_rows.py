"""Finds matrices whose rows lie in a checkpoint's safetensors files as they are, so that any of them can be read by
itself.

Input: the stored tensors that a parameter is made of. Output: the files and tensors that hold its rows, in their order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from zeroinf.model.source import StoredRows
from zeroinf.model.stored_parts import as_stored, parts_of
from zeroinf.model.weights import HeldTensor

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NUMBER = re.compile(r"\d+")


def find_rows(
    parameter: torch.Tensor, names: Sequence[str], stored: Mapping[str, HeldTensor]
) -> tuple[StoredRows, ...]:
    """Where the rows of `parameter` (rows, width) lie that are those of the tensors `names`, one after the other by the
    numbers in their names; empty unless they lie in safetensors files as numbers of one dtype, and are all of it."""
    in_order = sorted(names, key=lambda name: [int(number) for number in _NUMBER.findall(name)])
    held = [stored[name] for name in in_order]
    are_rows = all(
        one.file.suffix == ".safetensors"
        and one.meta.dim() == 2
        and one.meta.shape[1] == parameter.shape[1]
        and one.meta.dtype in _FLOATING
        for one in held
    )
    kinds = {one.meta.dtype for one in held}
    if not are_rows or len(kinds) != 1 or sum(one.meta.shape[0] for one in held) != parameter.shape[0]:
        return ()
    dtype = str(kinds.pop()).removeprefix("torch.")
    return tuple(StoredRows(one.file, name, one.meta.shape[0], dtype) for name, one in zip(in_order, held, strict=True))


def unchanged_names(parameter: torch.Tensor) -> tuple[str, ...]:
    """The stored tensors that `parameter` of a skeleton is made of, where it has no others and they are not changed;
    else empty."""
    parts = parts_of(parameter) or ()
    names = tuple(name for part in parts for name in part.names)
    return names if len(names) == len(parts) and all(part.make is as_stored for part in parts) else ()
