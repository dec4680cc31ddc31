"""Tables are embeddings that tokens read by row, and that nothing uses as a whole."""

from __future__ import annotations

from pathlib import Path

import torch
from small_models import small_config
from torch import nn

from zeroinf.model.anatomy import Anatomy
from zeroinf.model.inspect import build_meta, read_anatomy
from zeroinf.model.resolve import resolve_model
from zeroinf.model.skeleton import build_skeleton
from zeroinf.model.tables import find_tables


def meta_model(name: str, **fields: object) -> nn.Module:
    config = small_config(name)
    config.update(fields)
    model: nn.Module = build_meta(config, "float32")
    return model


def test_input_embeddings_are_a_table_unless_the_head_uses_them() -> None:
    (table,) = find_tables(meta_model("llama"))
    assert (table.tensor, table.rows, table.width, table.rows_per_token) == ("model.embed_tokens.weight", 384, 64, 1)
    assert table.token_bytes == table.row_bytes == 64 * 4
    assert find_tables(meta_model("llama_tied")) == ()


def test_positions_that_a_module_shifts_before_it_reads_rows_are_none() -> None:
    found = find_tables(meta_model("opt", tie_word_embeddings=False))
    assert [table.tensor for table in found] == ["model.decoder.embed_tokens.weight"]


def test_a_matrix_that_is_multiplied_elsewhere_is_none() -> None:
    model = meta_model("llama")
    head = model.lm_head

    def multiplied(hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden, model.model.embed_tokens.weight)

    head.forward = multiplied
    assert find_tables(model) == ()


def test_an_embedding_of_a_layer_that_reads_several_rows_a_token_leaves_its_layer_alone() -> None:
    """As n-gram tables do: what streams of the layer is all the rest."""
    model = meta_model("llama")
    layer = model.model.layers[1]
    layer.grams = nn.Embedding(1000, 16, device="meta")
    inner, seen = layer.forward, list[torch.Tensor]()
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: seen.append(args[0]))

    def with_grams(hidden: torch.Tensor, **more: object) -> object:
        ids = torch.stack([seen[-1], seen[-1]], dim=-1)
        return inner(hidden + layer.grams(ids).flatten(-2)[..., :1], **more)

    layer.forward = with_grams
    found = {table.tensor: table for table in find_tables(model)}
    assert found["model.layers.1.grams.weight"].rows_per_token == 2
    assert found["model.layers.1.grams.weight"].token_bytes == 2 * 16 * 4


def test_without_tables_each_other_tensor_is_still_there() -> None:
    anatomy: Anatomy = read_anatomy(small_config("llama"))
    less = anatomy.without_tables()
    names = {tensor.name for tensor in anatomy.tensors()}
    assert names - {tensor.name for tensor in less.tensors()} == {"model.embed_tokens.weight"}
    assert less.blocks == anatomy.blocks


def test_a_skeleton_has_room_for_a_table_of_any_size(tmp_path: Path) -> None:
    config = small_config("llama")
    config.vocab_size = 1 << 36
    config.save_pretrained(tmp_path)
    model = build_skeleton(resolve_model(str(tmp_path), random_weights=True), "bfloat16")
    assert model.get_input_embeddings().weight.shape == (1 << 36, 64)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {buffer.device.type for buffer in model.buffers()} == {"cpu"}
