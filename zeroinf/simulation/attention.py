"""Simulates the allocations of attention kernels on a GPU, which the meta device would decompose into matrix products.

It follows the choice of kernels and the preparations in torch's `aten/src/ATen/native/transformers/attention.cpp` and
`cuda/sdp_utils.cpp`: a mask excludes the flash kernel, and becomes a bias whose rows are padded to 16 elements for the
memory-efficient kernel, which takes heads of any size; grouped queries that flash does not support are matrix products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from zeroinf.simulation.recorder import Recorder

_FLASH_HEAD = 256
_EFFICIENT_BIAS_ALIGNMENT = 16
# On an H200 it takes heads in tiles, those of one tile as long as wider ones, and so many keys' time more for each row
# and head (`scripts/bench-kernels`).
_EFFICIENT_TILE, _EFFICIENT_NARROW, _EFFICIENT_KEYS = 64, 80, 110
# Beyond this head size the memory-efficient kernel accumulates in a float32 buffer of the output's shape.
_EFFICIENT_REGISTER_HEAD = 128


class GpuAttention(TorchFunctionMode):
    """While active, attention on meta tensors allocates as it would on a GPU; `recorder` is told of its kernel."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and args[0].device.type == "meta":
            return self._attend(*args, **kwargs)
        return func(*args, **kwargs)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        rows, heads, length, size = query.shape
        grouped = key.shape[1] != heads
        half = query.dtype in (torch.float16, torch.bfloat16)
        flash = attn_mask is None and half and size == value.shape[3] <= _FLASH_HEAD and (enable_gqa or not grouped)
        if not flash and grouped:
            return functional.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        out = _flash(query, value) if flash else _efficient(query, key, value, attn_mask)
        pairs, read = rows * heads * length * key.shape[2], (query, key, value, out)
        if flash:
            self._recorder.kernel("attention", 2 * pairs * (size + value.shape[3]), read)
        else:
            width = _width(size) + _width(value.shape[3])
            keys = rows * heads * (key.shape[2] + _EFFICIENT_KEYS) * width * key.element_size()
            more = keys - key.numel() * key.element_size() - value.numel() * value.element_size()
            self._recorder.kernel("efficient attention", 2 * pairs * width, read, more)
        return out


def _width(head: int) -> int:
    return _EFFICIENT_NARROW if head <= _EFFICIENT_TILE else -(-head // _EFFICIENT_TILE) * _EFFICIENT_TILE


def _flash(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    rows, heads, length, _ = query.shape
    out = query.new_empty(rows, length, heads, value.shape[3]).transpose(1, 2)
    query.new_empty(rows, heads, length, dtype=torch.float32)  # the logarithms of the sums
    return out


def _efficient(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    rows, heads, length, _ = query.shape
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.where(mask, query.new_empty(()), query.new_empty(()))
        padding = -mask.shape[-1] % _EFFICIENT_BIAS_ALIGNMENT
        if padding:
            mask = functional.pad(mask, (0, padding))
    out = query.new_empty(rows, length, heads, value.shape[3])
    if value.shape[3] > _EFFICIENT_REGISTER_HEAD and query.dtype != torch.float32:
        query.new_empty(rows, length, heads, value.shape[3], dtype=torch.float32)
    return out.transpose(1, 2)
