"""Keeps the encoder's output of encoder-decoder models for as long as their rows run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from zeroinf.errors import ModelError
from zeroinf.generation.row import Row
from zeroinf.generation.upload import to_device


def decoder_start(model: Any) -> int:
    """The token that the decoder of a model with an encoder begins with, as transformers' `generate` chooses it.

    Raises ModelError where the generation config names none.
    """
    config = model.generation_config
    start = config.decoder_start_token_id if config.decoder_start_token_id is not None else config.bos_token_id
    if not isinstance(start, int):
        raise ModelError(
            f"the model's generation config has {start!r} as decoder_start_token_id",
            hint="zeroinf wants one token, the same for all rows",
        )
    return start


class EncodedPrompts:
    """The prompts of one micro-batch: the first forward reads them, and what it leaves serves the others.

    They are padded on the right: an encoder counts positions from the first column on.
    """

    def __init__(self, rows: Sequence[Row], pad_token: int, device: torch.device) -> None:
        width = max(len(row.source) for row in rows)
        flat = [token for row in rows for token in (*row.source, *[pad_token] * (width - len(row.source)))]
        self._given: dict[str, Any] = {"input_ids": to_device(flat, device).view(-1, width)}
        self._mask: torch.Tensor | None = None
        if min(len(row.source) for row in rows) < width:
            lengths = to_device([len(row.source) for row in rows], device)
            self._mask = (torch.arange(width, device=device) < lengths[:, None]).long()
        self._cross = DynamicCache()

    def inputs(self) -> dict[str, Any]:
        """The arguments of the model's forward for the prompts."""
        mask = {} if self._mask is None else {"attention_mask": self._mask}
        return {**self._given, **mask}

    def cache(self, own: DynamicCache) -> EncoderDecoderCache:
        """`own`, the cache of the decoder's own tokens, and what cross-attention keeps of the prompts."""
        return EncoderDecoderCache(own, self._cross)

    def keep(self, output: Any) -> None:
        """Keep the encoder's last state: with it, a forward leaves the encoder out."""
        self._given = {"encoder_outputs": BaseModelOutput(last_hidden_state=output.encoder_last_hidden_state)}
