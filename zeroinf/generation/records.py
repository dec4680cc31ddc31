"""The layout of a token's keys and values in host memory: one record of bytes, in the model's dtype or as int8 with
scales.
"""

from __future__ import annotations

import torch

from zeroinf.model.cache_layout import Record, TokenState

_HIGHEST_CODE = 127


def write(record: Record, into: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Write states (rows, heads, tokens, width) into `into` (rows, tokens, bytes), uint8.

    A code is its element over the scale of its token and head, rounded; a scale is the largest magnitude over 127.
    Raises RuntimeError for states of another kind than the record's.
    """
    for number, (kind, states) in enumerate(((record.keys, keys), (record.values, values))):
        expected = (into.shape[0], kind.heads, into.shape[1], kind.width)
        if states.shape != expected or states.dtype != _dtype(kind):
            raise RuntimeError(f"{states.dtype} {tuple(states.shape)} is not {kind.dtype} {expected}")
        states = states.transpose(1, 2)
        if record.dtype == "model":
            _part(record, into, number, kind.dtype).copy_(states)
            continue
        numbers = states.float()
        scales = numbers.abs().amax(-1, keepdim=True).div_(_HIGHEST_CODE)
        _part(record, into, 2 + number, "float32").copy_(scales)
        scales.masked_fill_(scales == 0, 1)  # nothing but zeros
        _part(record, into, number, "int8").copy_(numbers.div(scales).round_())


def read(record: Record, held: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values (rows, heads, tokens, width) in `held` (rows, tokens, bytes): views of it, unless codes."""
    found = []
    for number, kind in enumerate((record.keys, record.values)):
        if record.dtype == "model":
            states = _part(record, held, number, kind.dtype)
        else:
            codes, scales = _part(record, held, number, "int8"), _part(record, held, 2 + number, "float32")
            states = (codes * scales).to(_dtype(kind))
        found.append(states.transpose(1, 2))
    return found[0], found[1]


def parts(record: Record, held: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Keys and values (records, heads, width) in `held` (records, bytes), views of it; of codes (int8), their scales
    (records, heads, 1) behind them."""
    if record.dtype == "model":
        return _part(record, held, 0, record.keys.dtype), _part(record, held, 1, record.values.dtype)
    return tuple(_part(record, held, number, "int8" if number < 2 else "float32") for number in range(4))


def _part(record: Record, of: torch.Tensor, number: int, dtype: str) -> torch.Tensor:
    """Keys, values or the scales of one of them, by `number`: (rows, tokens, heads, width), of scales (.., 1)."""
    kind = (record.keys, record.values)[number % 2]
    width = kind.width if number < 2 else 1
    start = record.starts[number]
    end = start + kind.heads * width * getattr(torch, dtype).itemsize
    part: torch.Tensor = of[..., start:end].view(getattr(torch, dtype))
    return part.view(*part.shape[:-1], kind.heads, width)


def _dtype(kind: TokenState) -> torch.dtype:
    found: torch.dtype = getattr(torch, kind.dtype)
    return found
