"""Embeddings in host memory, whose rows the CPU gathers for each forward: tokens are those of plain transformers."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers
from fake_machines import overhead, shape_of, workload_of
from generating import greedy_by_transformers, rows_of, run_rows
from ranks import on_ranks
from safetensors.torch import load_file
from test_stream_tokens import PACKED, counted_host_memory, plain_tokens, stream, tokens_of
from tiers import tiered
from tiny_models import FAMILIES
from transformers import AutoModelForCausalLM

from zeroinf.distributed.control import Control
from zeroinf.engines.stream import gather, weights
from zeroinf.engines.stream.stream_memory import stream_gpu_terms, stream_host_terms
from zeroinf.model.inspect import read_anatomy
from zeroinf.planner.choice import Choice

# gpt_neox is converted as it loads, gemma3n has a table for all layers beside tied input embeddings, qwen4_exp tables
# inside of layers, of which a token reads many rows.
NAMES = ("llama", "gpt_neox", "mixtral", "mamba2", "gemma3n", "qwen4_exp")
DEFAULT = ("gpt_neox", "gemma3n", "qwen4_exp")

Checkpoint = Callable[[str], Path]


@pytest.fixture
def checkpoint(small_checkpoint: Checkpoint, tmp_path: Path) -> Checkpoint:
    own = {"gemma3n": _gemma3n, "qwen4_exp": _qwen4_exp}
    return lambda name: _save(own[name](), tmp_path / name) if name in own else small_checkpoint(name)


def _gemma3n() -> Any:
    return transformers.Gemma3nTextConfig(
        vocab_size=384, vocab_size_per_layer_input=384, hidden_size=64, hidden_size_per_layer_input=16,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=[96] * 3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], sliding_window=32, laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 3, num_kv_shared_layers=0, max_position_embeddings=256,
    )  # fmt: skip


def _qwen4_exp() -> Any:
    if "qwen4_exp" not in FAMILIES:
        pytest.skip("this transformers does not have the model, or not so that it streams")
    return transformers.Qwen4ExpTextConfig(
        vocab_size=384, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        layer_types=["linear_attention", "indexed_attention", "linear_attention"], linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16, moe_intermediate_size=32,
        shared_expert_intermediate_size=32, num_experts=4, num_experts_per_tok=2, ple_layer_ids=[1, 3],
        ple_embed_dim=64, ngram_vocab_size_base=500, hc_lowrank=16, split_ngram_parts=12, max_position_embeddings=256,
        eos_token_id=2, indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=8,
        indexer_compress_ratio=4,
    )  # fmt: skip


def _save(config: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", tiered(NAMES, DEFAULT))
@pytest.mark.parametrize("embeddings", ["cpu", "disk"])
@pytest.mark.parametrize("offload", ["cpu", "nvme"])
def test_tokens_are_those_of_plain_transformers(
    name: str, offload: str, embeddings: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = checkpoint(name)
    disk: dict[str, Any] = {"nvme_blocks": 3, "nvme_paths": (tmp_path,)} if offload == "nvme" else {}
    for _ in range(1 + bool(disk)):  # a store is written, and found again
        engine = stream(folder, offload=offload, embeddings=embeddings, **disk)
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


def test_rows_in_files_are_converted_as_they_are_read(small_checkpoint: Checkpoint, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(small_checkpoint("llama"), dtype=torch.bfloat16).save_pretrained(tmp_path)
    engine = stream(tmp_path, embeddings="disk")
    assert tokens_of(engine) == plain_tokens(tmp_path)
    stats = engine.stats()
    assert stats.rows_read > 0
    assert stats.stalls.disk_s == pytest.approx(stats.rows_read_s)
    engine.close()


def test_a_table_twice_as_large_as_host_memory_runs(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Its rows but for the first ones are a hole in the file."""
    small, large, name = checkpoint("gemma3n"), tmp_path / "large", "model.embed_tokens_per_layer.weight"
    tensors = load_file(small / "model.safetensors")
    table = tensors.pop(name)
    rows = 2 * psutil.virtual_memory().total // (table.shape[1] * 4)
    large.mkdir()
    config = json.loads((small / "config.json").read_text())
    (large / "config.json").write_text(json.dumps({**config, "vocab_size_per_layer_input": rows}))
    shapes = {**{key: list(value.shape) for key, value in tensors.items()}, name: [rows, table.shape[1]]}
    ends = [0, *itertools.accumulate(4 * math.prod(shape) for shape in shapes.values())]
    header = json.dumps(
        {
            key: {"dtype": "F32", "shape": shape, "data_offsets": span}
            for (key, shape), span in zip(shapes.items(), itertools.pairwise(ends), strict=True)
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    with (large / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for value in (*tensors.values(), table):
            file.write(value.numpy().tobytes())
        file.truncate(8 + len(header) + ends[-1])
    engine = stream(large, embeddings="disk")
    assert tokens_of(engine) == plain_tokens(small)
    engine.close()


@pytest.mark.parametrize("embeddings", ["cpu", "disk"])
@pytest.mark.parametrize("fetch", tiered(["replicated", "partitioned"], ["partitioned"]))
def test_ranks_read_the_rows_of_one_copy(fetch: str, embeddings: str, small_checkpoint: Checkpoint) -> None:
    folder = small_checkpoint("llama")
    expected = plain_tokens(folder)

    def body(control: Control) -> Any:
        engine = stream(folder, control=control, embeddings=embeddings, world_size=2, fetch=fetch)
        try:
            return tokens_of(engine), engine.stats().shared_host_bytes
        finally:
            engine.close()

    found, codes = on_ranks(2, body)
    assert codes == [0, 0]
    assert [tokens for tokens, _ in found] == [expected] * 2


def test_tables_inside_of_layers_do_not_stream_with_them(checkpoint: Checkpoint) -> None:
    folder = checkpoint("qwen4_exp")
    moved = {where: stream(folder, embeddings=where).stats().streamed_bytes_per_pass for where in ("gpu", "cpu")}
    anatomy = read_anatomy(stream(folder).model.config, dtype="float32")
    tables = [table for table in anatomy.tables if ".layers." in table.tensor]
    assert [table.rows_per_token for table in tables] == [16, 16]
    left = moved["gpu"] - moved["cpu"] - sum(table.rows * table.row_bytes for table in tables)
    assert abs(left) <= 4096 * len(tables), "but for the rounding of pieces"


def test_no_weights_but_those_of_the_forward_are_on_the_device(
    small_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies in host memory and passes through buffers is what the plan says, to the byte."""
    made = counted_host_memory(monkeypatch, weights, gather)
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
