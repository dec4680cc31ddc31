"""Maps the names of quantization methods in configs to the modules that support them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zeroinf.model.anatomy import Quantized
from zeroinf.model.quantized.bnb import hold_bitsandbytes
from zeroinf.model.quantized.compressed_tensors import hold_compressed_tensors
from zeroinf.model.quantized.fp8 import hold_fp8
from zeroinf.model.quantized.gguf import hold_gguf
from zeroinf.model.quantized.gptq import hold_auto_round, hold_awq, hold_gptq
from zeroinf.model.quantized.mxfp4 import hold_mxfp4
from zeroinf.model.quantized.scaled import hold_modelopt
from zeroinf.model.source import quantization


def hold_quantized(model: Any) -> Quantized | None:
    """Let modules of `model` hold their weights as its checkpoint does, if that is quantized; None where it is not.

    `model` is a skeleton whose parameters are on the meta device. Its modules have an `Expansion` each, to weights in
    the dtype of `model`. Raises ModelError for a format that is not known to run, and
    EnvironmentProblem where the package that runs it is missing.
    """
    found = quantization(model.config)
    if found is None:
        return None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    _HOLD[found["quant_method"]](model, found)
    return Quantized(method=found["quant_method"], parameters=parameters)


_HOLD: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    "auto-round": hold_auto_round,
    "awq": hold_awq,
    "bitsandbytes": hold_bitsandbytes,
    "compressed-tensors": hold_compressed_tensors,
    "fp8": hold_fp8,
    "gguf": hold_gguf,
    "gptq": hold_gptq,
    "modelopt": hold_modelopt,
    "mxfp4": hold_mxfp4,
}
