"""Explains errors of damaged checkpoint files, and of pickles that would run code, in the user's terms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError

from zeroinf.errors import ModelError


@contextmanager
def reading_weights(name: str) -> Iterator[None]:
    """Raises ModelError for files of the model `name` that are damaged, and for pickles that would run code."""
    from safetensors import SafetensorError

    try:
        yield
    except (UnpicklingError, EOFError, RuntimeError, SafetensorError) as error:
        if isinstance(error, SafetensorError) or is_cut_off(error):
            raise ModelError(f"the weights of {name} are damaged: {error}", hint="fetch them again") from error
        if not isinstance(error, UnpicklingError):
            raise
        raise ModelError(
            f"cannot load {name}: its pickled files hold more than weights, and could run code here",
            hint="convert it to safetensors where you trust it",
        ) from error


def is_cut_off(error: Exception) -> bool:
    """Whether `error` is what torch says of a file of which the end, or all, is missing: it has words for it only."""
    words = ("PytorchStreamReader failed", "pickle data was truncated", "unexpected EOF")
    return isinstance(error, EOFError) or any(some in str(error) for some in words)
