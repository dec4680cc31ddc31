"""Checkpoints of GPTQ (versions 1 and 2, also with `desc_act`), AWQ (`gemm`), and AutoRound, which packs like either.

Layouts: AutoGPTQ's `qlinear_cuda`, GPTQModel's `checkpoint_format`, AutoAWQ's `WQLinear_GEMM`. Words of 32 bits hold
codes along the inputs (GPTQ) or along the outputs (AWQ, in an order of its own), and words of one input, or of one
group, lie side by side. GPTQ's version 1 stores zero points less one. As they are read, words are brought into the
order of compressed-tensors, in which those of one output lie side by side: expansion, and products on codes, read rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from zeroinf.errors import ModelError
from zeroinf.model.quantized.expansion import OTHER_CHECKPOINT, Held, refused
from zeroinf.model.quantized.expert_codes import integer_kind
from zeroinf.model.quantized.integers import expand_integers, pack, packed_size, unpack
from zeroinf.model.quantized.linears import Coded, MatrixFormat, Stored, hold_linears

# Column 4 of each eight lies in the second place of a word, and so on.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_SCALE_TYPES = (torch.float16, torch.bfloat16, torch.float32)


def hold_gptq(model: Any, found: dict[str, Any]) -> None:
    """Let linear layers and experts hold codes, scales, zero points and the order of groups."""
    layout = found.get("checkpoint_format") or found.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise refused(model, f"gptq in the format {layout}", "it runs gptq and gptq_v2")
    if "bits" not in found or "group_size" not in found:
        raise refused(model, "gptq", "its config names no bits and no group_size")
    form = _Gptq(found["bits"], found["group_size"], bool(found.get("desc_act")), 1 if layout == "gptq" else 0)
    hold_linears(model, found, "gptq", form, "qweight", _kept(found))


def hold_awq(model: Any, found: dict[str, Any]) -> None:
    """Let linear layers and experts hold codes, scales and zero points."""
    version = str(found.get("version") or found.get("format") or "gemm").lower()
    if version != "gemm":
        raise refused(model, f"awq in the version {version}", "it runs gemm")
    bits = found.get("bits", found.get("w_bit", 4))
    form = _Awq(bits, found.get("group_size", found.get("q_group_size", 128)))
    hold_linears(model, found, "awq", form, "qweight", _kept(found))


def hold_auto_round(model: Any, found: dict[str, Any]) -> None:
    """Hold AutoRound's weights as GPTQ's version 1 or as AWQ, whichever the checkpoint is packed like."""
    packing = str(found.get("packing_format") or found.get("backend") or "")
    if found.get("data_type", "int") != "int":
        raise refused(model, f"auto-round of {found['data_type']}", "it runs int")
    if packing.endswith("auto_awq"):
        hold_awq(model, {**found, "version": "gemm"})
    elif packing.endswith("auto_gptq"):
        hold_gptq(model, {**found, "checkpoint_format": "gptq", "desc_act": False})
    else:
        raise refused(model, f"auto-round packed as {packing or 'it does not say'}", "it runs auto_gptq and auto_awq")


def _kept(found: Mapping[str, Any]) -> Callable[[str], bool]:
    """A test for linear layers that are not quantized, as far as a config says it: heads and routers never are."""
    names = [*(found.get("modules_to_not_convert") or ()), "lm_head"]
    dropped = [rule[2:] for rule in found.get("dynamic") or {} if rule.startswith("-:")]

    def is_kept(layer: str) -> bool:
        is_router = layer.endswith((".gate", ".router", ".shared_expert_gate"))
        return is_router or any(name in layer for name in names) or any(re.match(rule, layer) for rule in dropped)

    return is_kept


@dataclass(frozen=True, slots=True)
class _InWords(MatrixFormat):
    """Codes, zero points and scales of groups of inputs, held as compressed-tensors has them."""

    bits: int
    group: int

    def held(self, name: str, one: Stored) -> Stored:
        return Stored(one.dtype, (one.shape[1], one.shape[0]))

    def expand(self, held: Held, whole: torch.Tensor) -> None:
        expand_integers(whole, held["qweight"], held["scales"], held["qzeros"])

    def coded(self, rows: int, columns: int, stored: Mapping[str, Stored]) -> Coded | None:
        scales = stored["scales"]
        kind = integer_kind(self.bits, rows, columns, scales.shape[0], scales.dtype, has_zeros=True)
        checked = ("g_idx",) if "g_idx" in stored else ()
        names = {"blocks": "qweight", "scales": "scales", "zeros": "qzeros"}
        return None if kind is None else Coded(kind, names, checked)

    def _why_not(
        self, usual: Mapping[str, Stored], columns: int, stored: Mapping[str, Stored], widths: Sequence[int]
    ) -> str | None:
        """Why tensors `stored` are not the `usual` ones, whose codes have one of `widths` bits."""
        if unknown := set(stored) - {*usual, "bias"}:
            return f"has {', '.join(sorted(unknown))}, which is not known"
        if self.bits not in widths:
            return f"has codes of {self.bits} bits"
        for name, expected in usual.items():
            one = stored.get(name)
            if one is None or one.shape != expected.shape:
                return f"has {name} in the shape {one and one.shape}, not {expected.shape}: another width or group"
        if columns % stored["scales"].shape[0]:
            return f"has {columns} inputs, which groups of {self.group} do not divide"
        return None if stored["scales"].dtype in _SCALE_TYPES else f"has scales of {stored['scales'].dtype}"


@dataclass(frozen=True, slots=True)
class _Gptq(_InWords):
    is_ordered: bool
    """Groups are made of any inputs, which `g_idx` tells."""
    less: int
    """Zero points are stored so much too low."""

    def usual(self, rows: int, columns: int) -> dict[str, Stored]:
        groups = ceil(columns / self.group) if self.group > 0 else 1
        return {
            "qweight": Stored(torch.int32, (packed_size(columns, self.bits), rows)),
            "qzeros": Stored(torch.int32, (groups, packed_size(rows, self.bits))),
            "scales": Stored(torch.float16, (groups, rows)),
            "g_idx": Stored(torch.int32, (columns,)),
        }

    def why_not(self, rows: int, columns: int, stored: Mapping[str, Stored]) -> str | None:
        usual = self.usual(rows, columns)
        if not self.is_ordered and "g_idx" not in stored:
            del usual["g_idx"]
        return self._why_not(usual, columns, stored, (2, 3, 4, 8))

    def coded(self, rows: int, columns: int, stored: Mapping[str, Stored]) -> Coded | None:
        return None if self.is_ordered else super(_Gptq, self).coded(rows, columns, stored)

    def held(self, name: str, one: Stored) -> Stored:
        """Of groups that are not in order, scales and zero points of one group stay side by side."""
        return one if name == "g_idx" or (self.is_ordered and name != "qweight") else super(_Gptq, self).held(name, one)

    def read(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        if name == "g_idx":
            self._check_order(stored)
            return stored
        if name == "qzeros" and self.less:
            stored = pack((unpack(stored, self.bits, -1) + self.less) & ((1 << self.bits) - 1), self.bits)
        return stored if self.is_ordered and name != "qweight" else stored.T.contiguous()

    def expand(self, held: Held, whole: torch.Tensor) -> None:
        codes, scales, zeros = held["qweight"], held["scales"], held["qzeros"]
        if self.is_ordered:
            expand_integers(whole, codes, scales.mT, zeros.mT, held["g_idx"])
        else:
            expand_integers(whole, codes, scales, zeros)

    def _check_order(self, order: torch.Tensor) -> None:
        group = self.group if self.group > 0 else order.numel()
        if not self.is_ordered and not torch.equal(order, torch.arange(len(order), dtype=order.dtype) // group):
            raise ModelError(
                "its groups are not in order (g_idx), though its config has no desc_act", hint=OTHER_CHECKPOINT
            )


@dataclass(frozen=True, slots=True)
class _Awq(_InWords):
    def usual(self, rows: int, columns: int) -> dict[str, Stored]:
        groups = ceil(columns / self.group) if self.group > 0 else 1
        return {
            "qweight": Stored(torch.int32, (columns, packed_size(rows, self.bits))),
            "qzeros": Stored(torch.int32, (groups, packed_size(rows, self.bits))),
            "scales": Stored(torch.float16, (groups, rows)),
        }

    def why_not(self, rows: int, columns: int, stored: Mapping[str, Stored]) -> str | None:
        if columns % 8:
            return f"has {columns} inputs, which do not fill words of eight"
        return self._why_not(self.usual(rows, columns), columns, stored, (4,))

    def held(self, name: str, one: Stored) -> Stored:
        if name != "qweight":
            return super(_Awq, self).held(name, one)
        return Stored(one.dtype, (one.shape[1] * 8, one.shape[0] // 8))

    def read(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        if name == "qweight":
            return _along_inputs(stored)
        if name == "qzeros":
            return pack(unpack(stored, self.bits, -1, _AWQ_ORDER), self.bits).T.contiguous()
        return stored.T.contiguous()


def _along_inputs(words: torch.Tensor) -> torch.Tensor:
    """AWQ's words (inputs, outputs / 8) of codes of eight outputs as words (outputs, inputs / 8) of eight inputs: the
    8 x 8 codes of eight words are transposed, halves of words first with halves of others, then smaller parts."""
    inputs, across = words.shape
    own = list(words.view(inputs // 8, 8, across).unbind(1))
    for step, mask in ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F)):
        for at in (at for at in range(8) if not at & step):
            changed = ((own[at] >> (4 * step)) ^ own[at + step]) & mask
            own[at + step] = own[at + step] ^ changed
            own[at] = own[at] ^ (changed << (4 * step))
    return torch.stack([own[_AWQ_ORDER.index(place)] for place in range(8)], -1).flatten(1).T.contiguous()
