"""Loads weights with transformers' own loader, for engines that run its models unmodified."""

from __future__ import annotations

from typing import Any

import torch

from zeroinf.compat.deepspeed import builds_partitions
from zeroinf.errors import ModelError
from zeroinf.model.inspect import auto_class, keeping_untied
from zeroinf.model.reading import is_cut_off, reading_weights
from zeroinf.model.source import ModelSource


def load_pretrained(source: ModelSource, dtype: torch.dtype, **where: Any) -> Any:
    """transformers' `from_pretrained` with `where` (a device map), in evaluation mode.

    Pickled files are read as weights only. Raises ModelError for a checkpoint that cannot be read, or that does not
    hold all of the model.
    """
    with reading_weights(source.name), keeping_untied(source.config):
        try:
            model, info = auto_class(source.config).from_pretrained(
                source.location,
                config=source.config,
                dtype=dtype,
                revision=source.revision,
                trust_remote_code=source.trust_remote_code,
                weights_only=True,
                output_loading_info=True,
                **where,
            )
        except (OSError, ValueError, RuntimeError) as error:
            # Under ZeRO perhaps a collective that another rank broke.
            broken = isinstance(error, RuntimeError) and builds_partitions()
            if broken or isinstance(error, torch.OutOfMemoryError) or is_cut_off(error):
                raise
            raise ModelError(f"cannot load {source.name}: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"the weights of {source.name} lack {len(missing)} tensors of {type(model).__name__}, such as {missing[0]}",
            hint="fetch the checkpoint again",
        )
    return model.eval()
