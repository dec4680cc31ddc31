"""What weights become that cross the link as codes, written down once more and as plainly as possible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from zeroinf.model.inspect import read_anatomy
from zeroinf.planner.wire import Wire, is_coded

_BITS_AND_GROUP = {"int8": (8, 64), "int4": (4, 32)}


def through_codes(weights: torch.Tensor, wire: Wire) -> torch.Tensor:
    """`weights` after a round trip: any shape, any floating dtype."""
    bits, size = _BITS_AND_GROUP[wire]
    lowest_code, flat = -(2 ** (bits - 1)), weights.reshape(-1)
    padded = torch.cat((flat.float(), torch.zeros(-flat.numel() % size)))
    groups = padded.reshape(-1, size)
    negative, positive = groups.min(1).values, groups.max(1).values
    farthest = torch.where(positive > -negative, positive, negative)
    scale = (farthest / lowest_code).bfloat16().float()[:, None]
    codes = torch.round(groups / torch.where(scale == 0, torch.ones_like(scale), scale))
    codes = codes.clamp(lowest_code, -lowest_code - 1)
    return (codes * scale).to(weights.dtype).reshape(-1)[: flat.numel()].reshape(weights.shape)


def save_through_codes(folder: Path, wire: Wire, to: Path) -> Path:
    """The checkpoint in `folder`, written to `to` with the weights of its blocks after a round trip."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tensors = dict(model.named_parameters())
    changed = 0
    with torch.no_grad():
        for block in read_anatomy(model.config, dtype="float32").blocks:
            for spec, coded in zip(block.tensors, is_coded(block.tensors, "float32", wire), strict=True):
                if coded:
                    tensors[spec.name].copy_(through_codes(tensors[spec.name], wire))
                    changed += 1
    assert changed
    model.save_pretrained(to)
    return to
