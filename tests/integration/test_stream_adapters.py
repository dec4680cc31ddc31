"""LoRA adapters are merged as their base model's weights are read; what is more than LoRA is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed import packed_checkpoint
from safetensors.torch import save_file
from test_stream_tokens import plain_tokens, stream, tokens_of
from transformers import AutoModelForCausalLM

from zeroinf.errors import ModelError, UsageError
from zeroinf.model.identity import weights_identity
from zeroinf.model.resolve import resolve_model
from zeroinf.model.tokenizer import load_tokenizer

LAYERS = ("self_attn.q_proj", "self_attn.v_proj")
RANK = 4

Lora = Callable[..., Path]


@pytest.fixture
def lora(small_checkpoint: Callable[[str], Path], tmp_path: Path) -> Lora:
    """`lora(architecture)`: a folder with an adapter as PEFT saves it, with `more` in its config or among its tensors;
    in `merged` below it the model that it makes."""

    def make(name: str = "llama", more: dict[str, Any] | None = None, tensor: str = "", base: str = "") -> Path:
        folder = tmp_path / f"lora-{name}"
        folder.mkdir()
        model = AutoModelForCausalLM.from_pretrained(small_checkpoint(name))
        generator, tensors = torch.Generator().manual_seed(0), {}
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "bias": "none", "target_modules": list(LAYERS)}
        config |= {"base_model_name_or_path": base or str(small_checkpoint(name)), "lora_dropout": 0.1, **(more or {})}
        scale = 8 / (RANK**0.5 if config.get("use_rslora") else RANK)
        for path, module in model.named_modules():
            if path.endswith(LAYERS):
                outputs, inputs = module.weight.shape
                a, b = (
                    torch.randn(RANK, inputs, generator=generator),
                    torch.randn(outputs, RANK, generator=generator) / 8,
                )
                tensors |= {f"base_model.model.{path}.lora_{x}.weight": y for x, y in (("A", a), ("B", b))}
                module.weight.data += b @ a * scale
        if tensor:
            tensors[tensor] = torch.ones(4)
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config))
        model.save_pretrained(folder / "merged")
        return folder

    return make


@pytest.mark.parametrize(("name", "more"), [("llama", {}), ("mixtral", {"use_rslora": True})])
def test_tokens_are_those_of_the_merged_model(name: str, more: dict[str, Any], lora: Lora, tmp_path: Path) -> None:
    folder = lora(name, more)
    expected = plain_tokens(folder / "merged")
    on_disk = {"offload": "nvme", "nvme_blocks": 2, "resident_blocks": 1, "nvme_paths": (tmp_path,)}
    for where in ({}, on_disk, {"embeddings": "disk"}):
        engine = stream(folder, **where)
        assert tokens_of(engine) == expected
        engine.close()


def test_an_adapter_is_another_model_than_its_base(lora: Lora, small_checkpoint: Callable[[str], Path]) -> None:
    folder = lora()
    source, base = resolve_model(str(folder)), resolve_model(str(small_checkpoint("llama")))
    assert weights_identity(source) != weights_identity(base)
    assert load_tokenizer(source) is not None
    config = json.loads((folder / "adapter_config.json").read_text())
    before = weights_identity(source)
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 16}))
    assert weights_identity(resolve_model(str(folder))) != before


@pytest.mark.parametrize(
    ("more", "tensor", "message"),
    [
        ({"use_dora": True}, "", "it has use_dora"),
        ({"peft_type": "IA3"}, "", "its peft_type is IA3, not LORA"),
        ({"modules_to_save": ["lm_head"]}, "", "it has modules_to_save"),
        ({"init_lora_weights": "pissa"}, "", "its init_lora_weights is pissa"),
        ({"new_trick": 1}, "", "what it says of new_trick is not known"),
        ({}, "base_model.model.lm_head.weight", "it holds base_model.model.lm_head.weight"),
    ],
)
def test_what_is_more_than_lora_is_refused_by_name(more: dict[str, Any], tensor: str, message: str, lora: Lora) -> None:
    with pytest.raises(ModelError, match=message):
        resolve_model(str(lora("llama", more, tensor)))


def test_adapters_of_quantized_models_and_for_other_engines_are_refused(lora: Lora, tmp_path: Path) -> None:
    folder = lora(base=str(packed_checkpoint("llama", "awq", tmp_path / "awq")))
    with pytest.raises(ModelError, match=r"changes model\.layers\.0\.self_attn\.q_proj, which is no linear layer"):
        resolve_model(str(folder))
    with pytest.raises(UsageError, match="is a LoRA adapter, which is merged by the stream engine"):
        resolve_model(str(folder), in_full=True)
