"""Weights through transformers' own loader, and what is wrong with files that hold none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

import torch

from zeroinf.errors import ModelError
from zeroinf.model.inspect import auto_class
from zeroinf.model.source import ModelSource


def load_pretrained(source: ModelSource, dtype: torch.dtype, **where: Any) -> Any:
    """transformers' `from_pretrained` with `where` (a device map), in evaluation mode.

    Pickled files are read as weights only. Raises ModelError for a checkpoint that cannot be read.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    with reading_weights(source):
        try:
            model = auto_class(source.config).from_pretrained(
                source.location,
                config=source.config,
                dtype=dtype,
                revision=source.revision,
                trust_remote_code=source.trust_remote_code,
                weights_only=True,
                **where,
            )
        except (OSError, ValueError, RuntimeError) as error:
            # Under ZeRO perhaps a collective that another rank broke.
            broken = isinstance(error, RuntimeError) and is_deepspeed_zero3_enabled()
            if broken or isinstance(error, torch.OutOfMemoryError) or _is_cut_off(error):
                raise
            raise ModelError(f"cannot load {source.name}: {error}") from error
    return model.eval()


@contextmanager
def reading_weights(source: ModelSource) -> Iterator[None]:
    """Raises ModelError for files of `source` that are damaged, and for pickles that would run code."""
    from safetensors import SafetensorError

    try:
        yield
    except (UnpicklingError, EOFError, RuntimeError, SafetensorError) as error:
        if isinstance(error, SafetensorError) or _is_cut_off(error):
            raise ModelError(f"the weights of {source.name} are damaged: {error}", hint="fetch them again") from error
        if not isinstance(error, UnpicklingError):
            raise
        raise ModelError(
            f"cannot load {source.name}: its pickled files hold more than weights, and could run code here",
            hint="convert it to safetensors where you trust it",
        ) from error


def _is_cut_off(error: Exception) -> bool:
    """Whether `error` is what torch says of a file of which the end, or all, is missing: it has words for it only."""
    words = ("PytorchStreamReader failed", "pickle data was truncated", "unexpected EOF")
    return isinstance(error, EOFError) or any(some in str(error) for some in words)
