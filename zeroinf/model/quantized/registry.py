"""Maps the names of quantization methods in configs to the modules that support them.

A format's module is imported when a checkpoint needs it; docs/contributing/add-a-format.md shows how to add one.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from zeroinf.model.anatomy import Quantized
from zeroinf.model.config import quantization

_HOLD = {
    "auto-round": ("gptq", "hold_auto_round"),
    "awq": ("gptq", "hold_awq"),
    "bitsandbytes": ("bnb", "hold_bitsandbytes"),
    "compressed-tensors": ("compressed_tensors", "hold_compressed_tensors"),
    "fp8": ("fp8", "hold_fp8"),
    "gguf": ("gguf", "hold_gguf"),
    "gptq": ("gptq", "hold_gptq"),
    "hqq": ("hqq", "hold_hqq"),
    "modelopt": ("scaled", "hold_modelopt"),
    "mxfp4": ("mxfp4", "hold_mxfp4"),
    "torchao": ("torchao", "hold_torchao"),
}
"""Module of this package, and its function that takes a skeleton and the config's `quantization_config`."""

METHODS = tuple(_HOLD)
"""Ways to quantize a checkpoint that stream as they are, by the names that configs give them."""


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
    module, function = _HOLD[found["quant_method"]]
    getattr(import_module(f"zeroinf.model.quantized.{module}"), function)(model, found)
    return Quantized(method=found["quant_method"], parameters=parameters)
