"""Silences DeepSpeed: its logs and prints would mix with results on stdout."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout


@contextmanager
def quiet_deepspeed() -> Iterator[None]:
    """Keep stdout for results, where DeepSpeed logs and prints, and stderr free of what no user can act upon."""
    import deepspeed
    from deepspeed.utils import logger

    # Compiled on first use (a minute), for an all-reduce between CPUs that gloo does as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger.setLevel(logging.ERROR)
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    with redirect_stdout(sys.stderr):
        yield
