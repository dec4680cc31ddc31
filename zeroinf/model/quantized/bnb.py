"""Checkpoints of bitsandbytes: 4-bit codes (NF4, FP4) in blocks along matrix rows, or int8 with a scale for each row.

Layouts are those of `bitsandbytes.functional` (`QuantState`, `dequantize_4bit`, `int8_vectorwise_dequant`): the first
of two codes is in a byte's high bits; the scales of blocks may be codes themselves, of which 256 share a scale.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import ceil
from typing import Any

import torch

from zeroinf.errors import ModelError
from zeroinf.model.quantized.expansion import OTHER_CHECKPOINT, Held, refused
from zeroinf.model.quantized.integers import by_slices
from zeroinf.model.quantized.linears import MatrixFormat, Stored, hold_linears

_BLOCK, _NESTED_BLOCK = 64, 256
_STATE = "weight.quant_state.bitsandbytes__"
_PER_127 = 7.874015718698502e-3


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
        stacks = whole if whole.dim() > 2 else whole[None]
        for number, into in enumerate(stacks):
            own = {name: tensor[number] if whole.dim() > 2 else tensor for name, tensor in held.items()}
            _expand_four_bits(own, into)


def _expand_four_bits(held: Held, whole: torch.Tensor) -> None:
    rows, columns = whole.shape
    scales = held["weight.absmax"]
    if (nested := held.get("weight.nested_absmax")) is not None:
        offset = next(tensor for name, tensor in held.items() if name.startswith(_STATE))
        shared = nested.repeat_interleave(_NESTED_BLOCK)[: scales.numel()]
        scales = held["weight.nested_quant_map"][scales.long()] * shared + offset
    block = rows * columns // scales.numel()
    codes, values = held["weight"].view(-1), held["weight.quant_map"]

    def weights(stack: slice, some: slice) -> torch.Tensor:
        first, last = some.start * columns, min(some.stop, rows) * columns
        own = codes[first // 2 : ceil(last / 2)]
        found = values[torch.stack((own >> 4, own & 15), dim=-1).flatten().long()][first % 2 :][: last - first]
        at = torch.arange(first, last, device=codes.device) // block
        return found * scales[at]

    by_slices(whole, 1, weights)


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
        codes, scales = held["weight"], held["SCB"][..., None]

        def weights(stack: slice, some: slice) -> torch.Tensor:
            own, scale = (codes[stack, some], scales[stack, some]) if whole.dim() > 2 else (codes[some], scales[some])
            return own.float() * scale * _PER_127

        by_slices(whole, 1, weights)
