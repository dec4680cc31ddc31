"""Quantized checkpoints stream as they are, those of experts that transformers fuses too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SharedFolder
from packed import METHODS, kimi_checkpoint, packed_checkpoint
from ranks import on_ranks
from safetensors.torch import load_file, save_file
from test_stream_tokens import plain_tokens, stream, tokens_of
from tiers import tiered
from tiny_models import FAMILIES, tiny_config
from transformers import AutoModelForImageTextToText

from zeroinf.distributed.control import Control
from zeroinf.engines.stream.manage_stores import list_stores
from zeroinf.errors import ModelError
from zeroinf.model.inspect import read_anatomy
from zeroinf.model.resolve import resolve_model
from zeroinf.planner.memory import pieces

Packed = Callable[[str, str], Path]
MIXTURES = ("qwen3_moe", "mixtral", "deepseek_v3")
# Of layouts that differ in more than the width of their codes.
MIXED = [(name, method) for name in MIXTURES for method in ("gptq_ordered", "awq", "fp8")]
MIXED += [
    ("qwen3_moe", method)
    for method in sorted(METHODS)
    if method not in ("gptq_ordered", "awq", "fp8") and "bnb" not in method
]

USUAL = (
    "gptq_ordered",
    "gptq_v2",
    "awq",
    "fp8",
    "fp8_ue8m0",
    "w4a16_ordered",
    "nvfp4",
    "modelopt_nvfp4",
    "bnb_nf4_nested",
    "bnb_int8",
    "hqq_3",
    "torchao_intx",
    "torchao_tiles",
)
USUAL_MIXED = [
    ("qwen3_moe", "gptq_ordered"),
    ("qwen3_moe", "w4a16_asymmetric"),
    ("qwen3_moe", "nvfp4"),
    ("qwen3_moe", "fp8_experts_fp4"),
    ("mixtral", "awq"),
    ("deepseek_v3", "fp8"),
]


@pytest.fixture(scope="session")
def packed(shared_folder: SharedFolder) -> Packed:
    """`packed(architecture, method)`: a checkpoint packed so, with the model in full below it."""

    def get(name: str, method: str) -> Path:
        return shared_folder(f"packed-{method}-{name}", lambda folder: packed_checkpoint(name, method, folder) and None)

    return get


def run(folder: Path, **where: Any) -> list[list[int]]:
    engine = stream(folder, **where)
    try:
        return tokens_of(engine, batches=2)
    finally:
        engine.close()


@pytest.mark.parametrize("method", tiered(sorted(METHODS), USUAL))
def test_tokens_are_those_of_the_weights_in_full(method: str, packed: Packed) -> None:
    folder = packed("llama", method)
    assert run(folder) == plain_tokens(folder / "full")


@pytest.mark.parametrize(("name", "method"), tiered(MIXED, USUAL_MIXED))
def test_experts_that_transformers_fuses_give_these_tokens(name: str, method: str, packed: Packed) -> None:
    folder = packed(name, method)
    assert run(folder) == plain_tokens(folder / "full")


@pytest.mark.parametrize("method", tiered(["gptq_ordered", "fp8", "torchao_tiles", "hqq_3"], ["gptq_ordered", "fp8"]))
def test_nor_do_they_depend_on_where_weights_rest(method: str, packed: Packed, tmp_path: Path) -> None:
    folder = packed("qwen3_moe", method)
    expected = plain_tokens(folder / "full")
    assert run(folder, resident_blocks=2) == expected
    assert run(folder, offload="nvme", nvme_blocks=2, resident_blocks=1, nvme_paths=(tmp_path,)) == expected
    assert [store.state for store in list_stores([tmp_path])] == ["whole"]


def test_two_ranks_that_gather_codes_give_the_same_tokens(packed: Packed) -> None:
    folder = packed("qwen3_moe", "awq")

    def rank(control: Control) -> list[list[int]]:
        torch.set_num_threads(1)
        return tokens_of(stream(folder, fetch="partitioned", world_size=2, control=control))

    found, codes = on_ranks(2, rank)
    assert codes == [0, 0]
    assert found == [plain_tokens(folder / "full")] * 2


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("method", ["gptq", "awq", "fp8_ue8m0", "torchao_intx"])
def test_the_planned_bytes_are_those_of_the_checkpoint(name: str, method: str, packed: Packed) -> None:
    folder = packed(name, method)
    anatomy = read_anatomy(resolve_model(str(folder)).config, dtype="float32")
    stored = load_file(folder / "model.safetensors")
    held = [tensor for key, tensor in stored.items() if ".experts." not in key or not key.endswith("g_idx")]
    assert anatomy.weight_bytes == sum(tensor.numel() * tensor.element_size() for tensor in held)
    assert stream(folder).stats().streamed_bytes_per_pass == sum(pieces(anatomy))


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "hqq_4", "torchao_intx"])
def test_a_config_alone_lets_plan_the_same_bytes(method: str, packed: Packed, tmp_path: Path) -> None:
    folder = packed("qwen3_moe", method)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    planned = read_anatomy(resolve_model(str(tmp_path), random_weights=True).config, dtype="float32")
    assert planned.weight_bytes == read_anatomy(resolve_model(str(folder)).config, dtype="float32").weight_bytes


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("gptq", {"checkpoint_format": "marlin"}, "gptq in the format marlin"),
        ("gptq", {"bits": 8}, "has qweight in the shape"),
        ("gptq_ordered", {"desc_act": False}, "its groups are not in order"),
        ("awq", {"version": "gemv"}, "awq in the version gemv"),
        ("awq", {"group_size": 16}, "has qzeros in the shape"),
        ("auto_round_gptq", {"packing_format": "auto_round:other"}, "auto-round packed as auto_round:other"),
        ("fp8", {"weight_block_size": [16, 16]}, "has scales of torch.float32 in the shape"),
    ],
)
def test_what_is_not_known_to_be_exact_is_refused_by_name(
    method: str, fields: dict[str, Any], message: str, packed: Packed, tmp_path: Path
) -> None:
    folder = packed("llama", method)
    for file in folder.glob("*.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= fields
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        stream(tmp_path)


@pytest.mark.parametrize(
    ("method", "layer", "changed", "message"),
    [
        ("torchao_int8", "_weight_act_pre_scale", lambda tensors: torch.ones(1), "_weight_act_pre_scale"),
        ("torchao_int8", "_weight_scale", lambda tensors: tensors.to(torch.float64), "has scales of torch.float64"),
        ("torchao_tiles", "_weight_qdata", lambda tensors: tensors.flatten(2), "codes of torch.int32 in the shape"),
        ("hqq_4", "scale", lambda tensors: tensors.to(torch.uint8), "has scales of torch.uint8"),
        ("hqq_4", "W_q", lambda tensors: tensors[1:].contiguous(), "has codes"),
    ],
)
def test_tensors_of_another_layout_are_refused_by_name(
    method: str, layer: str, changed: Callable[[Any], torch.Tensor], message: str, packed: Packed, tmp_path: Path
) -> None:
    folder = packed("llama", method)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.1.mlp.up_proj.{layer}"
    tensors[name] = changed(tensors.get(name))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        resolve_model(str(tmp_path))


def test_experts_of_which_one_is_not_there_are_refused(packed: Packed, tmp_path: Path) -> None:
    folder = packed("qwen3_moe", "gptq")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.2.up_proj.scales"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"lacks 1 tensor .*model\.layers\.1\.mlp\.experts\.2\.up_proj\.scales"):
        resolve_model(str(tmp_path))


def test_experts_of_a_model_that_sees_images_stay_packed(tmp_path: Path) -> None:
    if "kimi_k25" not in FAMILIES:
        pytest.skip("this version of transformers does not have it")
    folder = kimi_checkpoint(tmp_path, tiny_config("kimi_k25"))
    engine = stream(folder, offload="none", resident_blocks=4)
    tokens, model = tokens_of(engine), engine.model
    whole = AutoModelForImageTextToText.from_pretrained(folder / "full", dtype=torch.float32)
    others = [name for name, _ in model.named_parameters() if ".experts." not in name]
    assert others and all(torch.equal(model.get_parameter(name), whole.get_parameter(name)) for name in others)
    assert model.model.language_model.layers[1].mlp.experts.down_proj_blocks.dtype == torch.int32
    engine.close()
    full = stream(folder / "full", offload="none", resident_blocks=4)
    assert tokens == tokens_of(full)
    full.close()
