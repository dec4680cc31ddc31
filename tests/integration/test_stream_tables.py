"""Embeddings in host memory, whose rows the CPU gathers for each forward: tokens are those of plain transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fake_machines import overhead, shape_of, workload_of
from generating import greedy_by_transformers, rows_of, run_rows
from ranks import on_ranks
from test_stream_tokens import PACKED, plain_tokens, stream, tokens_of
from tiers import tiered
from transformers import AutoModelForCausalLM

from zeroinf.distributed.control import Control
from zeroinf.engines.stream import gather, weights
from zeroinf.engines.stream.stream_memory import stream_gpu_terms, stream_host_terms
from zeroinf.model.inspect import read_anatomy
from zeroinf.planner.choice import Choice

# gpt_neox is converted as it loads, gemma3n has a table for all layers beside tied input embeddings.
NAMES = ("llama", "gpt_neox", "mixtral", "mamba2", "gemma3n")
DEFAULT = ("gpt_neox", "gemma3n")

Checkpoint = Callable[[str], Path]


@pytest.fixture
def checkpoint(small_checkpoint: Checkpoint, tmp_path: Path) -> Checkpoint:
    return lambda name: _gemma3n(tmp_path / name) if name == "gemma3n" else small_checkpoint(name)


def _gemma3n(folder: Path) -> Path:
    config = transformers.Gemma3nTextConfig(
        vocab_size=384, vocab_size_per_layer_input=384, hidden_size=64, hidden_size_per_layer_input=16,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=[96] * 3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], sliding_window=32, laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 3, num_kv_shared_layers=0, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", tiered(NAMES, DEFAULT))
@pytest.mark.parametrize("offload", ["cpu", "nvme"])
def test_tokens_are_those_of_plain_transformers(
    name: str, offload: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = checkpoint(name)
    disk: dict[str, Any] = {"nvme_blocks": 3, "nvme_paths": (tmp_path,)} if offload == "nvme" else {}
    for _ in range(1 + bool(disk)):  # a store is written, and found again
        engine = stream(folder, offload=offload, embeddings="cpu", **disk)
        try:
            assert tokens_of(engine, batches=2) == plain_tokens(folder)
        finally:
            engine.close()


def test_packed_forwards_gather_the_rows_of_all_their_sequences(small_checkpoint: Checkpoint) -> None:
    folder = small_checkpoint("llama")
    prompts = [[3 + (7 * number + 11 * at) % 380 for at in range(n)] for number, n in enumerate((7, 1, 20, 12))]
    rows = rows_of(prompts, [6, 9, 3, 2], ignore_eos=True)
    engine = stream(folder, embeddings="cpu")
    run_rows(engine, rows, **PACKED)
    engine.close()
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert [row.generated for row in rows] == [greedy_by_transformers(plain, row.prompt, row.generated) for row in rows]


@pytest.mark.parametrize("fetch", tiered(["replicated", "partitioned"], ["partitioned"]))
def test_ranks_read_the_rows_of_one_copy(fetch: str, small_checkpoint: Checkpoint) -> None:
    folder = small_checkpoint("llama")
    expected = plain_tokens(folder)

    def body(control: Control) -> Any:
        engine = stream(folder, control=control, embeddings="cpu", world_size=2, fetch=fetch)
        try:
            return tokens_of(engine), engine.stats().shared_host_bytes
        finally:
            engine.close()

    found, codes = on_ranks(2, body)
    assert codes == [0, 0]
    assert [tokens for tokens, _ in found] == [expected] * 2


def test_no_weights_but_those_of_the_forward_are_on_the_device(
    small_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies in host memory and passes through buffers is what the plan says, to the byte."""
    made: list[int] = []

    class Counted(weights.HostMemory):
        def __init__(self, nbytes: int, *more: Any, **named: Any) -> None:
            made.append(nbytes)
            super().__init__(nbytes, *more, **named)

    monkeypatch.setattr(weights, "HostMemory", Counted)
    monkeypatch.setattr(gather, "HostMemory", Counted)
    folder = small_checkpoint("llama")
    engine = stream(folder, embeddings="cpu", forward_tokens=40)
    model = engine.model
    table = model.get_input_embeddings().weight
    assert table.shape == (384, 64) and table.untyped_storage().nbytes() == 64 * 4
    anatomy = read_anatomy(model.config, dtype="float32")
    choice = Choice(
        engine="stream", offload="cpu", fetch="replicated", batch_size=4, micro_batch_rows=4, prefill_tokens=256,
        resident_blocks=0, nvme_blocks=0, forward_tokens=40, embeddings="cpu",
    )  # fmt: skip
    whole, work = replace(choice, embeddings="gpu"), workload_of(shape_of(4))
    host = {term.name: term.nbytes for term in stream_host_terms(anatomy, choice, 1, overhead(False))}
    on_gpu = {term.name: term.nbytes for term in stream_gpu_terms(anatomy, choice, work, 1, overhead(False))}
    kept = host["weights, page-locked"] + host["embeddings, page-locked"]
    assert made == [kept, on_gpu["head, norms"], host["gathered rows, page-locked"]]
    assert host["embeddings, page-locked"] == 384 * 64 * 4
    assert on_gpu["rows of embeddings"] == 40 * (64 * 4 + 8)
    before = {term.name: term.nbytes for term in stream_gpu_terms(anatomy, whole, work, 1, overhead(False))}
    assert before["embeddings, head, norms"] - on_gpu["head, norms"] == 384 * 64 * 4
    engine.close()


def test_a_forward_of_more_tokens_than_were_planned_still_runs(small_checkpoint: Checkpoint) -> None:
    engine = stream(small_checkpoint("llama"), embeddings="cpu", forward_tokens=2)
    assert tokens_of(engine) == plain_tokens(small_checkpoint("llama"))
    engine.close()
