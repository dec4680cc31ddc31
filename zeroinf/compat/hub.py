"""huggingface_hub's switch for its progress bars, which its documentation shows under `huggingface_hub.utils`.

A download whose progress is shown by zeroinf has no bars beside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_bars() -> Iterator[None]:
    """huggingface_hub draws no bars until the block ends, unless there are none anyway."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
