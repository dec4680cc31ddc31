"""Silences DeepSpeed: its logs and prints would mix with results on stdout."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from zeroinf.compat.deepspeed import without_shared_memory_op


@contextmanager
def quiet_deepspeed() -> Iterator[None]:
    """Keep stdout for results, where DeepSpeed logs and prints, and stderr free of what no user can act upon."""
    from deepspeed.utils import logger

    without_shared_memory_op()
    logger.setLevel(logging.ERROR)
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    with redirect_stdout(sys.stderr):
        yield
