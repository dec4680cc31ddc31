"""Asks transformers and compressed-tensors which modules of a model they quantize, and how.

Relies on `transformers.quantizers` and on `GptOssExperts`, as they are in transformers 5.17 to 5.24, and on modules of
compressed-tensors 0.15 to 0.20; each function names its own. Without them, the rules of each format about what stays
unquantized would have to be repeated. `tests/unit/test_compat.py` fails when they change.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any


def is_quantized(name: str, kept: Sequence[str] | None) -> bool:
    """Whether the module `name` is, where a config keeps the modules `kept` (names or patterns) as they are. Relies on
    `should_convert_module`."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    return bool(should_convert_module(name, kept))


def kept_modules(model: Any, named: Sequence[str] | None, in_float32: Sequence[str]) -> list[str]:
    """Modules of `model` that transformers does not quantize: those of the config (`named`), those that stay float32,
    and those that it adds by itself. Relies on `HfQuantizer.get_modules_to_not_convert`."""
    from transformers.quantizers.base import HfQuantizer

    found: list[str] = HfQuantizer.get_modules_to_not_convert(model, named, in_float32)
    return found


def gpt_oss_experts() -> type[Any]:
    """The class of gpt-oss' experts, whose weights are stacks (experts, inputs, outputs)."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    found: type[Any] = GptOssExperts
    return found


def hold_as_compressed_tensors(model: Any, found: Mapping[str, Any]) -> None:
    """Let the library's own modules replace those of `model` that the config `found` names; nothing is expanded.

    Relies on `AutoHfQuantizer`, and on its `compressor`, whose hook would expand the whole model for good. Raises
    ImportError where the library is missing, ValueError for what it does not take.
    """
    from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

    quantizer = AutoHfQuantizer.from_config(AutoQuantizationConfig.from_dict(found), pre_quantized=True)
    quantizer.validate_environment()
    with redirect_stderr(io.StringIO()), _by_itself():  # its progress bars: nothing is computed here
        quantizer.preprocess_model(model)
    quantizer.compressor.remove_decompression_hook(model)


@contextmanager
def _by_itself() -> Iterator[None]:
    """Let the library hold modules without other ranks, which it would wait for at each of them where there are any.

    Relies on `model_compressor.is_distributed`, which releases have that share the work out.
    """
    from compressed_tensors.compressors.model_compressors import model_compressor

    known = getattr(model_compressor, "is_distributed", None)
    if known is None:
        yield
        return
    vars(model_compressor)["is_distributed"] = lambda: False
    try:
        yield
    finally:
        vars(model_compressor)["is_distributed"] = known
