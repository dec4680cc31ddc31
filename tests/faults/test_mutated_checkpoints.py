"""A checkpoint with a tensor that was removed, renamed, cut or stored twice is refused, or gives the tokens of plain
transformers, in every engine. `scripts/checkpoint-matrix` tries all families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from driver import run_cell
from matrix import plain_tokens
from mutated_runs import PROMPTS, cell_of, sweep, totals
from mutations import doubled, rewritten
from ranks import on_ranks
from transformers import AutoModelForCausalLM

from zeroinf.distributed.control import Control


@pytest.mark.parametrize("name", ["llama_tied", "mixtral"])
def test_every_mutation_is_refused_or_gives_the_tokens_of_transformers(name: str, tmp_path: Path) -> None:
    tallies = sweep(name, tmp_path)
    assert [one for tally in tallies.values() for one in tally.other] == []
    found = totals(tallies)
    assert found["refused"] > 20
    assert found["equal"] == (1 if name == "llama_tied" else 0), "a head of its own runs"


@pytest.mark.parametrize(("engine", "fetch"), [("stream", "replicated"), ("stream", "partitioned"), ("zero", "auto")])
def test_two_ranks_use_a_head_that_is_stored_apart(
    engine: str, fetch: str, small_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    tied, head = "model.embed_tokens.weight", "lm_head.weight"
    folder = rewritten(small_checkpoint("llama_tied"), tmp_path / "m", lambda tensors: doubled(tensors, tied, head))
    cell = cell_of(folder, tmp_path, engine, "cpu") | {"fetch": fetch}

    def body(control: Control) -> dict[str, Any]:
        return run_cell(cell, control.world, control)

    ranks, _ = on_ranks(2, body, seconds=120)
    assert not any(isinstance(found, Exception) or found is None for found in ranks), ranks
    tokens = ranks[0]["tokens"] | ranks[1]["tokens"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    first = ranks[0]
    wanted = plain_tokens(model, first["prompts"], first["pad_token"], first["batch_size"], cell["max_new_tokens"])
    assert [tokens[index] for index in range(len(PROMPTS))] == wanted
