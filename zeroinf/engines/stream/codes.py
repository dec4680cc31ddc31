"""Weights as codes of a few bits: making them, once, and turning them back into weights where they compute.

A group of weights shares a scale: the weight that lies farthest from zero, on its side, over the lowest code. A weight
is its code times the scale, computed in float32 and rounded once to the model's dtype. Four-bit codes lie two in a
byte, the first half of a group in the low bits, the second half in the high ones. Nothing here depends on how many
threads or ranks share the work, nor on the device that does it.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext, suppress

import torch
from torch.nn.functional import pad

from zeroinf.planner.wire import Codes

SCALE_DTYPE = torch.bfloat16

# Elements that are computed at a time. On the CPU what lies between the steps stays in a core's cache.
_CHUNK = 1 << 17
# A GPU takes them in longer turns, since launches and copies of a turn cost as much for few: what is alive there takes
# some 24 bytes an element, and turns are shorter where there is no room for it.
_GPU_CHUNKS = (1 << 23, 1 << 20)
# Threads take turns on a GPU: it holds what lies between the steps of one of them.
_ON_GPU = threading.Lock()

_CPU = torch.device("cpu")


def encode(
    weights: torch.Tensor,
    dtype: torch.dtype,
    kind: Codes,
    codes: torch.Tensor,
    scales: torch.Tensor,
    device: torch.device = _CPU,
) -> None:
    """Write `weights` (one dimension) rounded to `dtype`, as `codes` (uint8) and `scales`. Zeros end the last group.

    It is computed on `device`, to the same bits on any, or on the CPU where the device has no room for it.
    """
    for chunk in _GPU_CHUNKS if device.type != "cpu" else ():
        with suppress(torch.OutOfMemoryError):
            _encode(weights, dtype, kind, codes, scales, device, chunk)
            return
    _encode(weights, dtype, kind, codes, scales, _CPU, _CHUNK)


def _encode(
    weights: torch.Tensor,
    dtype: torch.dtype,
    kind: Codes,
    codes: torch.Tensor,
    scales: torch.Tensor,
    device: torch.device,
    chunk: int,
) -> None:
    for start in range(0, weights.numel(), chunk):
        part = weights[start : start + chunk].to(device)
        with nullcontext() if device.type == "cpu" else _ON_GPU:
            packed, scale = _codes_of(part.to(dtype), kind)
        elements = scale.numel() * kind.group
        _part(scales, start, elements, kind.group).copy_(scale)
        _part(codes, start, elements, 8 // kind.bits).copy_(packed)


def _codes_of(weights: torch.Tensor, kind: Codes) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, as they lie in memory, and scales of `weights`."""
    groups = pad(weights.float(), (0, -weights.numel() % kind.group)).view(-1, kind.group)
    lowest, highest = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    farthest = torch.where(highest > -lowest, highest, lowest)
    scale = (farthest / -_offset(kind)).to(SCALE_DTYPE)
    divisor = scale.float()
    divisor.masked_fill_(divisor == 0, 1)  # a group of zeros
    groups.div_(divisor).round_().add_(_offset(kind)).clamp_(0, 2 * _offset(kind) - 1)
    return _packed(groups.to(torch.uint8), kind).view(-1), scale.view(-1)


def decode(codes: torch.Tensor, scales: torch.Tensor, kind: Codes, weights: torch.Tensor) -> None:
    """Write the weights that `codes` and `scales` stand for into `weights` (one dimension, of the model's dtype)."""
    for start in range(0, weights.numel(), _CHUNK):
        part = weights[start : start + _CHUNK]
        packed = _part(codes, start, part.numel(), 8 // kind.bits)
        values = _unpacked(packed, kind).float().view(-1, kind.group).sub_(_offset(kind))
        values.mul_(_part(scales, start, part.numel(), kind.group).float().unsqueeze(-1))
        part.copy_(values.view(-1))


def _offset(kind: Codes) -> int:
    """The number that is added to codes to make them unsigned."""
    return 1 << (kind.bits - 1)


def _part(of: torch.Tensor, start: int, elements: int, each: int) -> torch.Tensor:
    """The entries that belong to `elements` weights from `start` on, where `each` of them share one entry."""
    return of[start // each : (start + elements) // each]


def _packed(codes: torch.Tensor, kind: Codes) -> torch.Tensor:
    if kind.bits == 8:
        return codes
    low, high = codes.chunk(2, dim=-1)
    return low | (high << 4)


def _unpacked(codes: torch.Tensor, kind: Codes) -> torch.Tensor:
    if kind.bits == 8:
        return codes
    halves = codes.view(-1, kind.group // 2)
    return torch.cat((halves & 15, halves >> 4), dim=-1)
