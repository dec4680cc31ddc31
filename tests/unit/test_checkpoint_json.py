"""Weights listed in DeepSpeed's checkpoint JSON, whoever saved them, are those of the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import HEADS, build_model

from zeroinf.distributed.control import Control
from zeroinf.distributed.world import World
from zeroinf.engines.baselines.checkpoint_json import ListedWeights
from zeroinf.engines.stream.tensor_groups import group_tensors
from zeroinf.engines.stream.weight_source import LoadProgress
from zeroinf.errors import ModelError
from zeroinf.model.skeleton import build_skeleton
from zeroinf.model.source import ModelSource

MEGATRON_NAMES = {
    "gpt_neox": {"gpt_neox.": "", "embed_in": "embedding.word_embeddings", "final_layer_norm": "final_layernorm"},
    "bloom": {"transformer.h.": "layers.", "word_embeddings.": "embedding.word_embeddings.", "ln_f": "final_layernorm"},
    "gpt2": {
        "transformer.h.": "layers.",
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
        "attn.c_attn": "attention.query_key_value",
        "attn.c_proj": "attention.dense",
        "mlp.c_fc": "mlp.dense_h_to_4h",
        "mlp.c_proj": "mlp.dense_4h_to_h",
        "ln_f": "final_layernorm",
        "wte": "embedding.word_embeddings",
        "wpe": "embedding.position_embeddings",
    },
}


def source_of(model: Any) -> ModelSource:
    return ModelSource(
        name="x", location="x", revision=None, trust_remote_code=False, random_weights=True, config=model.config
    )


def loaded(model: Any, listing: Path) -> dict[str, torch.Tensor]:
    """What `listing` fills a skeleton of `model` with."""
    skeleton = build_skeleton(source_of(model), "float32")
    blocks, outside, _ = group_tensors(skeleton)
    groups = (*blocks, outside)
    pieces = [(i, torch.zeros(group.nbytes, dtype=torch.uint8)) for i, group in enumerate(groups)]
    origin = ListedWeights(
        groups, skeleton, listing, Control(World(), "cpu"), LoadProgress(1, lambda done, total: None)
    )
    origin.fill(pieces)
    return {
        name: view
        for index, piece in pieces
        for tensor, view in groups[index].views(piece)
        for name in tensor.names
        if tensor.is_parameter
    }


def write_listing(folder: Path, **fields: Any) -> Path:
    listing = folder / "checkpoint.json"
    listing.write_text(json.dumps({"version": 1.0, **fields}))
    return listing


def check(model: Any, found: Mapping[str, torch.Tensor]) -> None:
    own = dict(model.named_parameters())
    assert found.keys() >= own.keys()
    assert all(torch.equal(found[name], value) for name, value in own.items())


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_blooms_own_files_hold_whole_tensors_without_the_models_prefix(suffix: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = build_model("bloom")
    state = {name.removeprefix("transformer."): value.clone() for name, value in model.named_parameters()}
    halves = [dict(list(state.items())[at::2]) for at in (0, 1)]
    names = [f"part-{at}.{suffix}" for at in (0, 1)]
    for name, half in zip(names, halves, strict=True):
        (torch.save if suffix == "bin" else save_file)(half, tmp_path / name)
    check(model, loaded(model, write_listing(tmp_path, type="BLOOM", checkpoints=names)))


def in_blocks(fused: torch.Tensor) -> torch.Tensor:
    """All queries, then all keys, then all values: Megatron's version 0."""
    return fused.view(HEADS // 2, 3, -1, *fused.shape[1:]).transpose(0, 1).reshape(fused.shape)


def by_width(fused: torch.Tensor) -> torch.Tensor:
    """Version 1.0: the three of each element of a head together."""
    return fused.view(HEADS // 2, 3, -1, *fused.shape[1:]).transpose(1, 2).reshape(fused.shape)


def as_megatron(model: Any, architecture: str, layout: Callable[[torch.Tensor], torch.Tensor]) -> list[dict[str, Any]]:
    """What each of two ranks would have saved of `model`: rows of column-parallel layers, columns of the others."""
    ranks: list[dict[str, Any]] = [{}, {}]
    for name, value in model.named_parameters():
        if architecture == "gpt2" and value.dim() == 2 and ".h." in name:
            value = value.t()
        renamed = name
        for ours, theirs in MEGATRON_NAMES[architecture].items():
            renamed = renamed.replace(ours, theirs)
        renamed = renamed.replace("transformer.", "")
        if renamed.startswith(("layers.", "final_layernorm")):
            renamed = f"transformer.{renamed}"
        renamed = renamed.replace("embed_out", "output_layer").replace("lm_head", "output_layer")
        if renamed.startswith("word_embeddings_layernorm"):
            renamed = renamed.replace("word_embeddings_layernorm", "embedding.word_embeddings.norm")
        if "query_key_value" in renamed:
            whole = (
                value.reshape(3, HEADS, -1, *value.shape[1:]).transpose(0, 1).reshape(value.shape)
                if architecture == "gpt2"
                else value
            )
            parts = [layout(part) for part in whole.chunk(2)]
        elif "h_to_4h" in renamed or "word_embeddings.weight" in renamed or "output_layer" in renamed:
            parts = list(value.chunk(2))
        elif renamed.endswith(("dense.weight", "4h_to_h.weight")):
            parts = list(value.chunk(2, dim=1))
        else:
            parts = [value, value]
        for rank, part in zip(ranks, parts, strict=True):
            rank[renamed] = part.detach().clone()
    return ranks


@pytest.mark.parametrize("architecture", MEGATRON_NAMES)
@pytest.mark.parametrize(("version", "layout"), [(0, in_blocks), (1.0, by_width), (2.0, lambda fused: fused)])
def test_megatrons_parts_of_two_ranks_become_the_whole_model(
    architecture: str, version: float, layout: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    model = build_model(architecture)
    names = ["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"]
    for name, part in zip(names, as_megatron(model, architecture, layout), strict=True):
        torch.save({"module": part}, tmp_path / name)
    listing = write_listing(tmp_path, type="Megatron", checkpoints=names, version=version)
    check(model, loaded(model, listing))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"type": "Megatron"}, "checkpoints"),
        ({"type": "other", "checkpoints": []}, "unknown type 'other'"),
        ({"type": "BLOOM", "checkpoints": ["none.bin"]}, r"none.bin is missing"),
        ({"type": "ds_model", "checkpoints": {"tp": ["a", "b", "c"]}, "tp_size": 2}, "3 files of 2 ranks"),
    ],
)
def test_a_listing_that_cannot_be_used_is_refused_with_what_is_wrong(
    fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=words):
        loaded(build_model("bloom"), write_listing(tmp_path, **fields))


def test_weights_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    torch.save(dict(build_model("gpt_neox").named_parameters()), tmp_path / "weights.bin")
    with pytest.raises(ModelError, match="lists no transformer"):
        loaded(build_model("bloom"), write_listing(tmp_path, type="ds_model", checkpoints=["weights.bin"]))
