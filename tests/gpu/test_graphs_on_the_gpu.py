"""CUDA graphs of layers: captured on a GPU they give the tokens of plain transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generating import PlainEngine, greedy_by_transformers, rows_of, run_rows
from small_models import VOCABULARY, build_model

from zeroinf.generation.graphs import CudaCapturing, Graphs
from zeroinf.model.inspect import find_blocks

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("place", [{"pages": 9}, {"pages": 3, "host_tokens": 160}], ids=["pages", "host"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "gpt_oss", "mixtral", "qwen3_moe"])
def test_tokens_are_those_of_plain_transformers(name: str, place: dict[str, Any]) -> None:
    model: Any = build_model(name).to(CUDA)
    blocks = list(find_blocks(model)[1])
    graphs = Graphs(blocks, CudaCapturing(CUDA, torch.float32), (1, 2, 4, 8, 16))
    prompts = [[3 + (7 * row + 11 * at) % (VOCABULARY - 3) for at in range(n)] for row, n in enumerate((7, 1, 20, 12))]
    rows = rows_of(prompts, [19, 12, 7, 10], ignore_eos=True)
    run_rows(PlainEngine(model), rows, rows=3, draw=2, prefill_tokens=20, forward_tokens=13, **place)
    for block in blocks:
        del block.forward
    assert [row.generated for row in rows] == [greedy_by_transformers(model, row.prompt, row.generated) for row in rows]
    assert not graphs.refused
    assert graphs.replays > graphs.count > 0
