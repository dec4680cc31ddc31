"""A model ready to be given its weights: parameters on the meta device, buffers for real."""

from __future__ import annotations

import copy
from typing import Any

import torch

from zeroinf.model.inspect import as_in_checkpoint, auto_class, keeping_untied
from zeroinf.model.source import ModelSource


def build_skeleton(source: ModelSource, dtype: str) -> Any:
    """The language model of `source` in evaluation mode, weights tied, nothing loaded; takes almost no memory.

    Parameters have the shapes and dtypes that `from_pretrained` would give them, or, of a checkpoint that is quantized
    already, those of the checkpoint; buffers have the values that the model
    makes by itself; the generation config is the checkpoint's.
    """
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with keeping_untied(source.config):
        with no_init_weights(), init_empty_weights(include_buffers=False):
            model = auto_class(source.config).from_config(
                copy.deepcopy(source.config), dtype=getattr(torch, dtype), trust_remote_code=source.trust_remote_code
            )
        model.tie_weights()
    as_in_checkpoint(model, dtype)
    if (generation := read_generation_config(source)) is not None:
        model.generation_config = generation
    return model.eval()


def read_generation_config(source: ModelSource) -> Any | None:
    """The checkpoint's generation config; None where it has none."""
    from transformers import GenerationConfig

    if source.random_weights:
        return None
    try:
        return GenerationConfig.from_pretrained(source.location, revision=source.revision)
    except OSError:
        return None
