"""Checkpoints of gpt-oss, whose experts are codes of 4 bits (MXFP4) of which 32 share a power of two."""

from __future__ import annotations

from typing import Any

from zeroinf.compat import quantizers
from zeroinf.model.quantized.coded_experts import hold_coded_experts
from zeroinf.model.quantized.expert_codes import MXFP4


def hold_mxfp4(model: Any, found: dict[str, Any]) -> None:
    """Let experts hold their codes, transposed, and the powers of two."""
    experts_class = quantizers.gpt_oss_experts()
    names, kept = ("gate_up_proj", "down_proj"), found.get("modules_to_not_convert")
    for path, module in model.named_modules():
        if isinstance(module, experts_class) and quantizers.is_quantized(path, kept):
            hold_coded_experts(module, MXFP4, dict.fromkeys(names), is_transposed=True)
