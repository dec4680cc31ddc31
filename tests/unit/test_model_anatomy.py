"""An anatomy read on the meta device agrees with models that are really built, run and measured."""

from __future__ import annotations

import resource
from collections.abc import Callable
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import CONTEXT, LAYERS, REPRESENTATIVES, SEQ2SEQ_MODELS, SMALL_MODELS, build_model, small_config
from tiers import tiered
from transformers import AutoModelForCausalLM, BertConfig, LlamaForCausalLM

from zeroinf.errors import ModelError
from zeroinf.model.catalog import catalog_billions, catalog_config, catalog_names, catalog_parameters, mark_own_head
from zeroinf.model.inspect import build_meta, find_blocks, read_anatomy
from zeroinf.model.kv import cache_name, held_bytes, read_cache

ROWS, PROMPT, NEW = 2, 30, 12
NO_LIMIT = {"bloom", "mamba", "mamba2", "falcon_mamba"}
WINDOWED = {"cohere2", "exaone4", "gemma2", "gemma3_text", "gpt_oss", "mistral"}


def measured_cache_bytes(model: Any) -> tuple[int, int]:
    """Bytes of the cache at the end of a real generation, and the number of tokens in it."""
    ids = torch.arange(3, 3 + ROWS * PROMPT).reshape(ROWS, PROMPT)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        use_cache=True,  # MPT's config turns it off
    )
    cache = next(output[name] for name in ("cache", "past_key_values") if name in output)  # the latter before 5.24
    return sum(held_bytes(vars(layer)) for layer in cache.layers), PROMPT + NEW - 1


@pytest.mark.parametrize("name", tiered(sorted(SMALL_MODELS), REPRESENTATIVES))
def test_anatomy_equals_the_model_that_is_really_built(name: str) -> None:
    anatomy = read_anatomy(small_config(name))
    model = build_model(name)
    own = {tensor.name: tensor for tensor in anatomy.tensors()}
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == {
        n: t.shape for n, t in own.items() if not t.is_buffer
    }
    assert anatomy.weight_bytes == sum(p.nbytes for p in model.parameters())
    assert sum(t.nbytes for t in own.values() if t.is_buffer) == sum(b.nbytes for b in model.buffers())
    assert len(anatomy.blocks) == len(find_blocks(model)[1])
    assert anatomy.context_limit == (None if name in NO_LIMIT else CONTEXT)

    nbytes, tokens = measured_cache_bytes(model)
    assert ROWS * sum(layer.nbytes(tokens) for layer in anatomy.cache) == nbytes
    assert any(layer.window for layer in anatomy.cache) == (name in WINDOWED)


@pytest.mark.parametrize("name", ["llama_tied", "mixtral", "gpt_oss", "jamba", "deepseek_v3", "mamba"])
def test_a_saved_checkpoint_loads_with_the_bytes_that_the_anatomy_says(
    name: str, small_checkpoint: Callable[[str], Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(small_checkpoint(name), dtype=torch.bfloat16)
    anatomy = read_anatomy(small_config(name), dtype="bfloat16")
    assert anatomy.weight_bytes == sum(p.nbytes for p in model.parameters())
    nbytes, tokens = measured_cache_bytes(model)
    assert ROWS * sum(layer.nbytes(tokens) for layer in anatomy.cache) == nbytes


@pytest.mark.parametrize("name", tiered(sorted(set(SMALL_MODELS) - {"xglm"}), REPRESENTATIVES))
def test_small_models_do_not_repeat_one_token(name: str) -> None:
    ids = torch.arange(3, 3 + ROWS * PROMPT).reshape(ROWS, PROMPT)
    tokens = build_model(name).generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)[:, PROMPT:]
    assert len(set(tokens.flatten().tolist())) > 3


@pytest.mark.parametrize(
    ("name", "said"), [("cache", "does not go on with the cache"), ("kv_store", "takes none of cache, past_key_values")]
)
def test_a_cache_that_the_forward_leaves_alone_is_refused(name: str, said: str) -> None:
    model = build_meta(small_config("llama"), "float32")
    own = model.forward

    def forward(input_ids: Any, **inputs: Any) -> Any:
        return own(input_ids, use_cache=inputs["use_cache"])

    parameters = [Parameter("input_ids", Parameter.POSITIONAL_OR_KEYWORD), Parameter(name, Parameter.KEYWORD_ONLY)]
    forward.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    model.forward = forward
    with pytest.raises(ModelError, match=said):
        read_cache(model, CONTEXT)


def test_tied_weights_are_counted_once() -> None:
    tied, untied = read_anatomy(small_config("llama_tied")), read_anatomy(small_config("llama"))
    assert tied.tied == (("lm_head.weight", "model.embed_tokens.weight"),)
    assert untied.tied == ()
    assert untied.parameters - tied.parameters == tied.vocabulary * tied.hidden_size


def test_window_counts_all_that_the_cache_keeps() -> None:
    layer = read_anatomy(small_config("mistral")).cache[0]
    assert (layer.fixed_bytes, layer.bytes_per_token, layer.window) == (0, 2 * 2 * 16 * 4, 16)
    assert layer.nbytes(1000) == layer.nbytes(16) == 16 * layer.bytes_per_token


def test_state_space_cache_does_not_grow() -> None:
    anatomy = read_anatomy(small_config("mamba"))
    assert anatomy.kv_bytes_per_token == 0
    assert all(layer.nbytes(10) == layer.nbytes(10_000) > 0 for layer in anatomy.cache)


def test_float16_leaves_what_transformers_keeps_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules", ["input_layernorm"])
    config = small_config("llama")
    config.intermediate_size = 72  # anatomies are remembered: of a config that no other test reads
    anatomy = read_anatomy(config, dtype="float16")
    dtypes = {tensor.name: tensor.dtype for tensor in anatomy.tensors()}
    assert dtypes["model.layers.0.input_layernorm.weight"] == "float32"
    assert dtypes["model.layers.0.mlp.up_proj.weight"] == "float16"


def test_the_config_is_not_changed() -> None:
    config = small_config("llama")
    before = config.to_dict()
    read_anatomy(config, dtype="bfloat16")
    assert config.to_dict() == before


@pytest.mark.parametrize("name", ["rwkv", "minimax"])
def test_a_cache_that_cannot_be_read_is_refused(name: str) -> None:
    import transformers

    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
    config = {
        "rwkv": lambda: transformers.RwkvConfig(**size),
        "minimax": lambda: transformers.MiniMaxConfig(**size, num_attention_heads=4, intermediate_size=32),
    }[name]()
    with pytest.raises(ModelError, match=r"KV cache of .* cannot be read"):
        read_anatomy(config)


def test_a_model_without_a_stack_of_layers_is_refused() -> None:
    model = build_meta(small_config("llama"), "float32")
    model.config.num_hidden_layers = 99
    with pytest.raises(ModelError, match="no stack of 99 decoder layers"):
        find_blocks(model)


def test_what_transformers_cannot_build_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot build"):
        build_meta(BertConfig(is_encoder_decoder=True), "float32")


@pytest.mark.parametrize("name", sorted(SEQ2SEQ_MODELS))
def test_an_encoder_is_counted_with_what_it_leaves_for_the_decoder(name: str) -> None:
    config, model = small_config(name), build_model(name)
    mark_own_head(config, {"tie_word_embeddings": not name.endswith("_own_head")})
    anatomy = read_anatomy(config)
    assert anatomy.weight_bytes == sum(p.nbytes for p in model.parameters())
    assert (len(anatomy.blocks), anatomy.encoder_blocks, len(anatomy.cache)) == (LAYERS + 2, LAYERS, 2)
    assert anatomy.context_limit == (CONTEXT if "t5" not in name else None)
    ids = torch.arange(3, 3 + ROWS * PROMPT).reshape(ROWS, PROMPT)
    with torch.no_grad():
        output = model(input_ids=ids, decoder_input_ids=ids[:, :NEW], use_cache=True)
    found = output[cache_name(model)]
    own, cross = (
        sum(held_bytes(vars(layer)) for layer in cache.layers if layer.is_initialized)
        for cache in (found.self_attention_cache, found.cross_attention_cache)
    )
    assert own == ROWS * NEW * anatomy.kv_bytes_per_token
    assert anatomy.encoder is not None
    assert cross + output.encoder_last_hidden_state.nbytes == ROWS * PROMPT * anatomy.encoder.bytes_per_token


PUBLISHED = [name for name in catalog_names() if catalog_parameters(name) or catalog_billions(name)]


@pytest.mark.parametrize("name", tiered(PUBLISHED, PUBLISHED[::10]))
def test_published_parameter_counts_are_met(name: str) -> None:
    config = catalog_config(name)
    if hasattr(config, "quantization_config"):  # several weights in one element
        found = read_anatomy(config).parameters
    else:
        found = sum(parameter.numel() for parameter in build_meta(config, "bfloat16").parameters())
    if (exact := catalog_parameters(name)) is not None:
        assert found == exact
    else:  # with a picture encoder, or by a layer that predicts more tokens, some counts are a little higher
        assert found / 1e9 == pytest.approx(catalog_billions(name), rel=0.015)


def test_counts_that_are_known_by_heart() -> None:
    assert catalog_parameters("EleutherAI/pythia-160m") == 162_322_944
    assert catalog_parameters("Llama-2-7b") == 6_738_415_616
    assert catalog_billions("gpt-oss-120b") == 116.83
    assert set(catalog_names()) - set(PUBLISHED) == {"falcon-40b", "gpt-j-6b", "opt-66b", "opt-175b"}, (
        "published by name"
    )


def test_176_billion_parameters_take_seconds_and_no_memory() -> None:
    small = read_anatomy(catalog_config("pythia-160m"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    large = read_anatomy(catalog_config("bloom-176b"))
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert (small.parameters, large.parameters) == (162_322_944, 176_247_271_424)
    assert large.weight_bytes == 2 * large.parameters
    assert grown_kib < 64 * 2**10
