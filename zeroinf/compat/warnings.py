"""Drops warnings of libraries about what is only computed on paper, without keeping those of a later run from its user.

transformers warns once for each message: what is dropped here must not count as shown.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_library_warnings() -> Iterator[None]:
    """While it lasts, neither Python nor transformers shows warnings; those that are shown once are not used up."""
    from transformers.utils import logging as of_transformers

    verbosity, once = of_transformers.get_verbosity(), vars(logging.Logger)["warning_once"]
    of_transformers.set_verbosity(max(verbosity, logging.ERROR))
    logging.Logger.warning_once = logging.Logger.warning  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.Logger.warning_once = once  # type: ignore[attr-defined]
        of_transformers.set_verbosity(verbosity)
