"""GGUF files stream as they are stored, and give the greedy tokens of the model that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SharedFolder
from gguf_files import ARCHITECTURES, write_gguf
from ranks import on_ranks
from safetensors.torch import load_file
from test_stream_tokens import plain_tokens, stream, tokens_of
from tiers import tiered

from zeroinf.distributed.control import Control
from zeroinf.engines.stream.experts import coded_experts
from zeroinf.engines.stream.manage_stores import list_stores
from zeroinf.model.gguf.convert import convert_gguf
from zeroinf.model.inspect import build_meta, read_anatomy
from zeroinf.model.resolve import resolve_model

SMALL_BLOCKS = ["Q4_0", "Q8_0", "Q5_1", "Q4_1", "Q5_0", "IQ4_NL", "MXFP4"]
LARGE_BLOCKS = ["Q4_K", "Q6_K", "Q2_K", "Q3_K", "Q5_K", "IQ4_XS"]
CODEBOOKS = ["IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M"]
FEW_BITS = ["NVFP4", "TQ1_0", "TQ2_0"]
USUAL = ("llama", "qwen3_moe", "gpt_oss", "deepseek_v3", "gemma3_text", "gemma4_text", "nemotron_h_moe")
NUMBERS = ["F16", "BF16", "F32"]

# Architectures of whose files every release of transformers makes a tokenizer.
READ_BY_ALL = ("llama", "llama_tied", "mixtral", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")

Gguf = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZEROINF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def gguf_of(shared_folder: SharedFolder) -> Gguf:
    """`gguf_of(architecture, kinds)`: a file, and the checkpoint in full that it stands for."""

    def get(name: str, kinds: list[str], parts: int = 1) -> tuple[Path, Path]:
        if name not in READ_BY_ALL and not hasattr(
            import_module("transformers.integrations.gguf"), "convert_gguf_tokenizer"
        ):
            pytest.skip(f"this transformers makes no tokenizer of {name}'s files")

        def build(folder: Path) -> None:
            wide = wide_llama() if kinds in (LARGE_BLOCKS, CODEBOOKS, FEW_BITS) else None
            write_gguf(name, folder / f"{name}.gguf", kinds, model=wide, parts=parts).save_pretrained(folder / "full")

        folder = shared_folder(f"gguf-{name}-{kinds[0]}-{parts}", build)
        file, *_ = sorted(folder.glob("*.gguf"))
        return file, folder / "full"

    return get


def wide_llama() -> Any:
    """A Llama whose rows fill blocks of 256."""
    from small_models import EMBEDDING_STD, INIT_STD, small_config
    from transformers import AutoModelForCausalLM

    config = small_config("llama")
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 256, 512, 2
    config.head_dim = 64
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=INIT_STD)
        model.get_input_embeddings().weight.normal_(std=EMBEDDING_STD)
    return model


def run(file: Path, **where: Any) -> list[list[int]]:
    engine = stream(file, **where)
    try:
        return tokens_of(engine, batches=2)
    finally:
        engine.close()


@pytest.mark.parametrize("name", tiered(sorted(ARCHITECTURES), USUAL))
def test_tokens_are_those_of_the_model_that_the_file_stands_for(name: str, gguf_of: Gguf) -> None:
    file, full = gguf_of(name, SMALL_BLOCKS)
    assert run(file) == plain_tokens(full)


@pytest.mark.parametrize("kinds", [LARGE_BLOCKS, CODEBOOKS, FEW_BITS, NUMBERS], ids=lambda kinds: kinds[0])
def test_every_type_gives_these_tokens(kinds: list[str], gguf_of: Gguf) -> None:
    file, full = gguf_of("llama", kinds)
    assert run(file) == plain_tokens(full)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_nor_do_they_depend_on_where_weights_rest(name: str, gguf_of: Gguf, tmp_path: Path) -> None:
    file, full = gguf_of(name, SMALL_BLOCKS, parts=3)
    expected = plain_tokens(full)
    assert run(file, resident_blocks=2) == expected
    for _ in range(2):  # the store is written, and found again
        assert run(file, offload="nvme", nvme_blocks=2, resident_blocks=1, nvme_paths=(tmp_path,)) == expected
    (store,) = list_stores([tmp_path])
    assert store.state == "whole"


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe"])
def test_experts_in_mxfp4_are_stored_as_products_read_them(name: str, gguf_of: Gguf, tmp_path: Path) -> None:
    file, full = gguf_of(name, ["MXFP4"])
    assert coded_experts(build_meta(resolve_model(str(file)).config, "bfloat16"))
    expected = plain_tokens(full)
    assert run(file, resident_blocks=1) == expected
    nvme = {"offload": "nvme", "nvme_blocks": 2, "host_units": 3, "nvme_paths": (tmp_path,)}
    assert run(file, expert_parts=3, routed_tokens=4, **nvme) == expected


def test_scales_of_experts_go_with_them(gguf_of: Gguf, tmp_path: Path) -> None:
    file, full = gguf_of("gpt_oss", ["NVFP4", "Q8_0"])
    expected = plain_tokens(full)
    assert run(file, resident_blocks=1) == expected
    nvme = {"offload": "nvme", "nvme_blocks": 2, "host_units": 3, "nvme_paths": (tmp_path,)}
    assert run(file, expert_parts=3, routed_tokens=4, **nvme) == expected
    assert run(convert_gguf(file), dtype="bfloat16") == plain_tokens(full, torch.bfloat16)


def test_two_ranks_that_gather_blocks_give_the_same_tokens(gguf_of: Gguf) -> None:
    file, full = gguf_of("qwen3_moe", SMALL_BLOCKS)

    def rank(control: Control) -> list[list[int]]:
        torch.set_num_threads(1)
        return tokens_of(stream(file, fetch="partitioned", world_size=2, control=control))

    found, codes = on_ranks(2, rank)
    assert codes == [0, 0]
    assert found == [plain_tokens(full)] * 2


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "deepseek_v3"])
def test_what_rests_and_crosses_is_what_the_file_has(name: str, gguf_of: Gguf) -> None:
    from zeroinf.model.gguf.header import read_gguf

    file, _ = gguf_of(name, SMALL_BLOCKS)
    anatomy = read_anatomy(resolve_model(str(file)).config, dtype="float32")
    stored = sum(t.nbytes for called, t in read_gguf(file).tensors.items() if called.startswith("blk."))
    assert stored == sum(t.nbytes for block in anatomy.blocks for t in block.tensors if not t.is_buffer) + sum(
        t.nbytes for block in anatomy.blocks for t in block.tensors if t.name.endswith("e_score_correction_bias")
    )


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt_oss"])
def test_converted_in_full_it_is_the_same_model(name: str, gguf_of: Gguf) -> None:
    file, full = gguf_of(name, SMALL_BLOCKS)
    converted = convert_gguf(file)
    assert run(converted, dtype="bfloat16") == plain_tokens(full, torch.bfloat16)
    assert sum(len(load_file(shard)) for shard in converted.glob("*.safetensors"))
