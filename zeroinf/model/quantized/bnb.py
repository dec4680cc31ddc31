"""Checkpoints of bitsandbytes: 4-bit codes (NF4, FP4) in blocks along matrix rows, or int8 with a scale for each row.

Layouts are those of `bitsandbytes.functional` (`QuantState`, `dequantize_4bit`, `int8_vectorwise_dequant`): the first
of two codes is in a byte's high bits; the scales of blocks may be codes themselves, of which 256 share a scale.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from math import ceil
from typing import Any

import torch

from zeroinf.errors import ModelError
from zeroinf.model.quantized.expansion import OTHER_CHECKPOINT, Held, refused
from zeroinf.model.quantized.fused import Random, fused, random_bytes, random_scales
from zeroinf.model.quantized.integers import PER_127, by_slices, expand_integers
from zeroinf.model.quantized.linears import MatrixFormat, Stored, hold_linears

_BLOCK, _NESTED_BLOCK = 64, 256
_STATE = "weight.quant_state.bitsandbytes__"


def hold_bitsandbytes(model: Any, found: Mapping[str, Any]) -> None:
    """Let linear layers hold codes and scales. Activations stay as they are, with int8 too."""
    names = [*(found.get("llm_int8_skip_modules") or ()), "lm_head"]

    def is_kept(layer: str) -> bool:
        return any(name == layer or name in layer.split(".") for name in names) or ".experts." in layer

    if found.get("load_in_4bit") or found.get("_load_in_4bit"):
        if found.get("bnb_4bit_quant_storage", "uint8") != "uint8":
            raise refused(model, "bitsandbytes", f"its codes lie in {found['bnb_4bit_quant_storage']}, not in uint8")
        kind = str(found.get("bnb_4bit_quant_type", "fp4"))
        form = _FourBits(kind, bool(found.get("bnb_4bit_use_double_quant")))
        hold_linears(model, found, "bitsandbytes", form, "weight.absmax", is_kept)
    else:
        hold_linears(model, found, "bitsandbytes", _Int8(), "SCB", is_kept)


class _FourBits(MatrixFormat):
    def __init__(self, kind: str, nested: bool) -> None:
        self._kind, self._nested = kind, nested

    def usual(self, rows: int, columns: int) -> dict[str, Stored]:
        blocks = ceil(rows * columns / _BLOCK)
        found = {
            "weight": Stored(torch.uint8, (rows * columns // 2, 1)),
            "weight.quant_map": Stored(torch.float32, (16,)),
            "weight.absmax": Stored(torch.uint8 if self._nested else torch.float32, (blocks,)),
            f"{_STATE}{self._kind}": Stored(torch.uint8, (1,)),
        }
        if self._nested:
            found["weight.nested_absmax"] = Stored(torch.float32, (ceil(blocks / _NESTED_BLOCK),))
            found["weight.nested_quant_map"] = Stored(torch.float32, (256,))
        return found

    def why_not(self, rows: int, columns: int, stored: Mapping[str, Stored]) -> str | None:
        states = {name for name in stored if name.startswith(_STATE)}
        known = set(self.usual(rows, columns)) | {"bias"} | states
        if unknown := set(stored) - known:
            return f"has {', '.join(sorted(unknown))}, which is not known"
        if states - {f"{_STATE}nf4", f"{_STATE}fp4"} or len(states) != 1:
            return "does not say that its codes are nf4 or fp4"
        missing = set(self.usual(rows, columns)) - {f"{_STATE}{self._kind}"} - set(stored)
        if missing:
            return f"lacks {', '.join(sorted(missing))}"
        codes, scales = stored["weight"], stored["weight.absmax"]
        count, elements = torch.Size(scales.shape).numel(), rows * columns
        if codes != Stored(torch.uint8, (elements // 2, 1)) or elements % count or elements // count % 2:
            return f"has codes in the shape {codes.shape} with {count} scales"
        nested = stored.get("weight.nested_absmax")
        if nested is not None and nested.shape != (ceil(count / _NESTED_BLOCK),):
            return f"has {nested.shape} scales of {count} scales"
        return None

    def held(self, name: str, one: Stored) -> Stored:
        return Stored(torch.float32, (1,)) if name.startswith(_STATE) else one

    def read(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """The offset of the blocks' scales, out of the JSON in bytes that a layer stores about itself."""
        if not name.startswith(_STATE):
            return stored
        try:
            state = json.loads(bytes(stored.tolist()))
            if state.get("nested_blocksize", _NESTED_BLOCK) != _NESTED_BLOCK or state["quant_type"] not in name:
                raise ValueError(f"it says {state}")
            return torch.tensor([float(state.get("nested_offset", 0.0))])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ModelError(f"{name} of a layer cannot be read: {error}", hint=OTHER_CHECKPOINT) from error

    def expand(self, held: Held, whole: torch.Tensor) -> None:
        nested = "weight.nested_absmax" in held
        offset = next(tensor for name, tensor in held.items() if name.startswith(_STATE))
        rows, columns = whole.shape[-2:]
        scales = held["weight.absmax"]
        is_usual = columns % 8 == 0 and rows * columns // scales.shape[-1] % 8 == 0
        (_expand_fused if is_usual else _expand)(
            whole,
            held["weight"].flatten(-2),
            held["weight.quant_map"],
            scales,
            held["weight.nested_absmax"] if nested else None,
            held["weight.nested_quant_map"] if nested else None,
            offset if nested else None,
            _NESTED_BLOCK,
        )


def _expand(
    whole: torch.Tensor,
    codes: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    nested: torch.Tensor | None,
    nested_values: torch.Tensor | None,
    offset: torch.Tensor | None,
    nested_block: int,
) -> None:
    """Fill `whole` (..., rows, columns) with `values` of codes times scales of blocks; of a stack, all are stacked."""
    if whole.dim() > 2:
        for number, into in enumerate(whole):
            own = [None if one is None else one[number] for one in (nested, nested_values, offset)]
            _expand(into, codes[number], values[number], scales[number], own[0], own[1], own[2], nested_block)
        return
    rows, columns = whole.shape
    block = rows * columns // scales.numel()
    if nested is not None and nested_values is not None and offset is not None:
        shared = nested.repeat_interleave(nested_block)[: scales.numel()]
        scales = nested_values[scales.long()] * shared + offset

    def weights(stack: slice, some: slice) -> torch.Tensor:
        first, last = some.start * columns, min(some.stop, rows) * columns
        own = codes[first // 2 : ceil(last / 2)]
        found = values[torch.stack((own >> 4, own & 15), dim=-1).flatten().long()][first % 2 :][: last - first]
        at = torch.arange(first, last, device=codes.device) // block
        return found * scales[at]

    by_slices(whole, 1, weights)


@cache
def _random(is_nested: bool) -> Random:
    def random(stack: int, rows: int, columns: int, generator: torch.Generator) -> tuple[Any, ...]:
        blocks = rows * columns // _BLOCK
        more: tuple[torch.Tensor | None, ...] = (None, None, None)
        scales = random_scales(generator, torch.float32, stack, blocks)
        if is_nested:
            scales = random_bytes(generator, stack, blocks)
            shapes = (ceil(blocks / _NESTED_BLOCK),), (256,), (1,)
            more = tuple(random_scales(generator, torch.float32, stack, *shape) for shape in shapes)
        values = random_scales(generator, torch.float32, stack, 16) - 1
        return random_bytes(generator, stack, rows * columns // 2), values, scales, *more, _NESTED_BLOCK

    return random


_expand_fused = fused(
    "expand_four_bits(Tensor(a!) whole, Tensor codes, Tensor values, Tensor scales, Tensor? nested, "
    "Tensor? nested_values, Tensor? offset, int nested_block) -> ()",
    _expand,
    lambda whole, codes, values, scales, nested, *more: _random(nested is not None),
    {
        "bitsandbytes, nf4 or fp4": _random(False),
        "bitsandbytes, nf4 or fp4 with double quantization": _random(True),
    },
)


class _Int8(MatrixFormat):
    def usual(self, rows: int, columns: int) -> dict[str, Stored]:
        return {"weight": Stored(torch.int8, (rows, columns)), "SCB": Stored(torch.float32, (rows,))}

    def is_needed(self, name: str) -> bool:
        return name in ("weight", "SCB")

    def why_not(self, rows: int, columns: int, stored: Mapping[str, Stored]) -> str | None:
        if unknown := set(stored) - {"weight", "SCB", "weight_format", "bias"}:
            return f"has {', '.join(sorted(unknown))}, which is not known"
        expected = self.usual(rows, columns)
        wrong = [name for name in expected if stored.get(name) != expected[name]]
        return f"has {wrong[0]} as {stored.get(wrong[0])}" if wrong else None

    def expand(self, held: Held, whole: torch.Tensor) -> None:
        expand_integers(whole, held["weight"], held["SCB"][..., None], factor=PER_127)
