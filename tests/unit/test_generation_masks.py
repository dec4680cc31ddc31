"""Forwards of padded rows ask the device for nothing: the host enqueues the next pass while one runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from generating import PlainEngine, rows_of, run_rows
from small_models import VOCABULARY, build_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from zeroinf.generation.masks import padding_is_known

_READS = [torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.nonzero.default]


class Watched(PlainEngine):
    """Counts what forwards read back from the device."""

    reads = 0

    def forward(self, micro_batches: Sequence[Mapping[str, Any]]) -> list[Any]:
        engine = self

        class Counting(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                engine.reads += func in _READS
                return func(*args, **(kwargs or {}))

        with Counting():  # type: ignore[no-untyped-call]
            return super().forward(micro_batches)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "opt", "bloom", "gemma2", "mistral", "gpt_oss", "mixtral"])
def test_no_forward_of_padded_rows_reads_from_the_device(name: str) -> None:
    engine = Watched(build_model(name))
    prompts = [[3 + (7 * row + 11 * at) % (VOCABULARY - 3) for at in range(3 + 4 * row)] for row in range(4)]
    run_rows(engine, rows_of(prompts, 6, ignore_eos=True), micro_batch_rows=2)
    assert any(inputs.get("attention_mask") is not None for inputs in engine.asked)
    assert engine.reads == 0


def test_transformers_makes_its_own_masks_again_afterwards() -> None:
    before = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    with padding_is_known():
        assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is not before
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is before
