"""Builds a model without its weights: parameters on the meta device, buffers in memory."""

from __future__ import annotations

import copy
from math import prod
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from zeroinf.compat.models import building_skeletons, generation_config_of
from zeroinf.errors import ModelError
from zeroinf.model.inspect import as_in_checkpoint, auto_class, keeping_untied
from zeroinf.model.source import ModelSource

_LARGE_BYTES = 1 << 30


def build_skeleton(source: ModelSource, dtype: str) -> Any:
    """The language model of `source` in evaluation mode, weights tied, nothing loaded; takes almost no memory.

    Parameters have the shapes and dtypes that `from_pretrained` would give them, or, of a checkpoint that is quantized
    already, those of the checkpoint; buffers have the values that the model
    makes by itself; the generation config is the checkpoint's.
    """
    with keeping_untied(source.config):
        with building_skeletons(), _LargeOnMeta():
            model = auto_class(source.config).from_config(
                copy.deepcopy(source.config), dtype=getattr(torch, dtype), trust_remote_code=source.trust_remote_code
            )
        model.tie_weights()
    as_in_checkpoint(model, dtype)
    model.generation_config = read_generation_config(source)
    return model.eval()


class _LargeOnMeta(TorchFunctionMode):
    """Makes tensors of a GiB or more that nobody has filled on the meta device at once: they are parameters, which
    would be moved there once they are made, if they are no larger than host memory."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            shape = kwargs["size"] if not args else args if isinstance(args[0], int) else args[0]
            dtype: torch.dtype = kwargs.get("dtype") or torch.get_default_dtype()
            if prod(shape) * dtype.itemsize >= _LARGE_BYTES:
                kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def read_generation_config(source: ModelSource) -> Any:
    """The checkpoint's generation config; where it has none, the one that transformers makes of its config.json.

    Raises ModelError for one that cannot be read.
    """
    from transformers import GenerationConfig

    if source.random_weights:
        return GenerationConfig.from_model_config(source.config)
    try:
        try:
            return GenerationConfig.from_pretrained(source.location, revision=source.revision)
        except OSError as error:
            if isinstance(error.__context__, ValueError):  # not absent, but no JSON
                raise ValueError(str(error)) from error
        return generation_config_of(source.location, source.revision)
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"the generation config of {source.name} cannot be read: {error}") from error
