"""Lets transformers make attention masks without asking the device whether anything is padded.

Relies on the mask function `sdpa` in `ALL_MASK_ATTENTION_FUNCTIONS` (a registry that models read in each forward) and
on the arguments of `sdpa_mask`, as they are in transformers 5.17 to 5.24. Without it, the host would wait for the
device in every padded forward. `tests/unit/test_compat.py` fails when they change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask


@contextmanager
def padding_is_known() -> Iterator[None]:
    """While it lasts, models take it that a mask which they are given hides something: those of micro-batches do.

    transformers reads a mask back to see whether attention can do without it. In each forward the host would wait there
    until the device has done all that was enqueued before.
    """
    before = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = _mask
    try:
        yield
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = before


def _mask(
    *,
    attention_mask: torch.Tensor | None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **shape: Any,
) -> torch.Tensor | None:
    """Makes a mask with the signature of transformers' own functions; see AttentionMaskInterface there."""
    is_open = attention_mask is None
    mask: torch.Tensor | None = sdpa_mask(
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip and is_open,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip and is_open,
        **shape,
    )
    return mask
