"""Forwards of padded rows ask the device for nothing: the host enqueues the next pass while one runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from generating import PlainEngine, rows_of, run_rows, words
from small_models import PAD, VOCABULARY, build_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from zeroinf.compat.masks import padding_is_known
from zeroinf.generation.row import Row, Sampling

_READS = [torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.nonzero.default]
PROMPTS = [[3 + (7 * row + 11 * at) % (VOCABULARY - 3) for at in range(3 + 4 * row)] for row in range(4)]


class Reads(TorchDispatchMode):
    """Counts what is read back from the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in _READS
        return func(*args, **(kwargs or {}))


class Watched(PlainEngine):
    """Counts what forwards read."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.reads = Reads()

    def forward(self, micro_batches: Sequence[Mapping[str, Any]]) -> list[Any]:
        with self.reads:
            return super().forward(micro_batches)


class WatchedWithEncoder(Watched):
    """The same, for one micro-batch."""

    def forward(self, micro_batches: Sequence[Mapping[str, Any]]) -> list[Any]:
        self.asked += micro_batches
        with self.reads, torch.inference_mode():
            return [self.model(**inputs) for inputs in micro_batches]


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "opt", "bloom", "gemma2", "mistral", "gpt_oss", "mixtral"])
def test_no_forward_of_padded_rows_reads_from_the_device(name: str) -> None:
    engine = Watched(build_model(name))
    run_rows(engine, rows_of(PROMPTS, 6, ignore_eos=True), micro_batch_rows=2)
    assert any(inputs.get("attention_mask") is not None for inputs in engine.asked)
    assert engine.reads.count == 0


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_nor_does_one_behind_an_encoder(name: str) -> None:
    engine = WatchedWithEncoder(build_model(name))
    sampling = Sampling(max_new_tokens=6, ignore_eos=True)
    run_rows(engine, [Row(i, [PAD], sampling, words, source=source) for i, source in enumerate(PROMPTS)])
    assert all(inputs.get("attention_mask") is not None for inputs in engine.asked)
    assert engine.reads.count == 0


def test_transformers_makes_its_own_masks_again_afterwards() -> None:
    before = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    with padding_is_known():
        assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is not before
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is before
