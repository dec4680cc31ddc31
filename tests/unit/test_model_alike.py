"""Blocks of a model that are alike are known as such, and one of them is read for all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import small_config
from torch.nn import Module

from zeroinf.model.alike import first_alike
from zeroinf.model.inspect import build_meta, find_blocks, find_stacks, read_anatomy
from zeroinf.model.kv import empty_cache, read_cache

LAYERS = 8


def deep(name: str) -> tuple[Any, Any, Any]:
    """A small model with more layers than kinds of them, its decoder's config and its blocks."""
    config = small_config(name)
    config.num_hidden_layers = LAYERS
    if name == "gpt_oss":
        config.layer_types = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    model = build_meta(config, "float32")
    return model, model.config.get_text_config(decoder=True), find_blocks(model)[1]


@pytest.mark.parametrize(("name", "firsts"), [("llama", [0] * LAYERS), ("gpt_oss", [0, 1] * (LAYERS // 2))])
def test_blocks_are_alike_but_for_their_place(name: str, firsts: list[int]) -> None:
    _, config, blocks = deep(name)
    assert first_alike(config, blocks) == firsts


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block.self_attn, "scaling", 7.0),
        lambda block: setattr(block.self_attn, "own", object()),
        lambda block: setattr(block.mlp.up_proj, "weight", torch.nn.Parameter(torch.empty(3, device="meta"))),
        lambda block: setattr(block, "mlp", Module()),
    ],
)
def test_whatever_is_not_known_to_be_the_same_is_another_kind(change: Any) -> None:
    _, config, blocks = deep("llama")
    change(blocks[5])
    assert first_alike(config, blocks) == [0, 0, 0, 0, 0, 5, 0, 0]


def test_what_the_config_lists_block_by_block_tells_blocks_apart() -> None:
    _, config, blocks = deep("llama")
    config.skipped = [False] * (LAYERS - 1) + [True]
    config.every = [*range(LAYERS)]  # counts the blocks
    assert first_alike(config, blocks) == [0] * (LAYERS - 1) + [LAYERS - 1]


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "mamba"])
def test_a_cache_is_read_off_few_blocks_and_is_that_of_all(name: str) -> None:
    model, config, blocks = deep(name)
    runs = []
    for block in blocks:
        block.register_forward_pre_hook(lambda module, _: runs.append(module))
    found = read_cache(model, 64, find_stacks(model))
    assert len(set(runs)) == LAYERS  # all are visited once in each forward of the first length
    assert len(runs) <= 2 * LAYERS + 3 * 2 * (len({*first_alike(config, blocks)}) + 1)
    assert find_blocks(model)[1] is blocks
    assert found == read_cache(model, 64)  # of all blocks


def test_an_empty_cache_keeps_nothing_of_another() -> None:
    model = build_meta(small_config("qwen3_next"), "float32")
    one, other = empty_cache(model), empty_cache(model)
    for layer in one.layers:
        for value in vars(layer).values():
            if isinstance(value, dict):
                value["kept"] = True
        layer.is_initialized = True
    fresh = type(one)(config=model.config)
    assert [vars(layer) for layer in other.layers] == [vars(layer) for layer in fresh.layers]
    assert [vars(layer) for layer in empty_cache(model).layers] == [vars(layer) for layer in fresh.layers]


def test_a_model_that_was_read_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config("llama")
    config.intermediate_size = 88  # anatomies are remembered: of a config that no other test reads
    read_anatomy(config, dtype="float32")
    with monkeypatch.context() as without:
        without.setattr("zeroinf.model.inspect.auto_class", None)
        model = build_meta(config, "float32")
    assert build_meta(config, "float32") is not model  # which its first reader may have changed
