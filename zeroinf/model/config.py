"""Reads what a transformers config says about its checkpoint: the dtype of the weights, and how they are quantized.

Takes a config and imports neither torch nor transformers. Facts that only the weight files hold are `CheckpointFacts`.
"""

from __future__ import annotations

from typing import Any

DTYPES = ("bfloat16", "float16", "float32")
"""Dtypes that a model computes in."""


def config_dtype(config: Any) -> str:
    """The dtype that the config says its weights have, float32 when it says nothing."""
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(decoder=True), "dtype", None)
    return str(found or "float32").removeprefix("torch.")


def names_dtype(config: Any) -> bool:
    """Whether the config says which dtype its weights have."""
    parts = (config, config.get_text_config(decoder=True))
    return any(getattr(part, "dtype", None) is not None for part in parts)


def lift_quantization(config: Any) -> None:
    """Let `config` say itself how its checkpoint is quantized, where only its text model's config does."""
    text = getattr(config, "text_config", None)
    if text is None or getattr(config, "quantization_config", None) or not getattr(text, "quantization_config", None):
        return
    config.quantization_config = text.quantization_config
    del text.quantization_config


def quantization(config: Any) -> dict[str, Any] | None:
    """The quantization settings in `config` (a transformers config), its method's name under
    `quant_method`; None where it is not."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return None
    found = found if isinstance(found, dict) else found.to_dict()
    method = found.get("quant_method")
    return {**found, "quant_method": str(getattr(method, "value", method))}
