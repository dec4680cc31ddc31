"""The catalog of known shapes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from zeroinf.errors import ModelError
from zeroinf.model.anatomy import UNTIED
from zeroinf.model.catalog import catalog_config, catalog_hub_id, catalog_names, catalog_quantized
from zeroinf.paths import configs_directory


def test_every_entry_makes_a_config_of_a_model_that_generates_and_keeps_what_it_says() -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

    assert len(catalog_names()) >= 25
    for name in catalog_names():
        config = catalog_config(name)
        kind = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if config.is_encoder_decoder else MODEL_FOR_CAUSAL_LM_MAPPING
        assert type(config) in kind, name
        entry = json.loads((configs_directory() / "models" / f"{name}.json").read_text())
        if getattr(config, UNTIED, ()):
            assert entry.pop("tie_word_embeddings") is False, name  # T5's config would not keep it
        sizes = {key: value for key, value in entry.items() if isinstance(value, int) and not key.startswith("_")}
        kept = json.loads(config.to_json_string(use_diff=False))
        assert {key: kept[key] for key in sizes if key in kept}.items() <= sizes.items(), name
        dtype = entry["dtype"] if "dtype" in entry else whole(entry)
        assert str(config.dtype).removeprefix("torch.") == dtype, name


def whole(entry: dict[str, Any]) -> str:
    """The dtype of the model that a quantized checkpoint is of."""
    return str(catalog_config(entry["_base"]).dtype).removeprefix("torch.")


def test_quantized_checkpoints_are_found_by_their_model_and_are_its_shapes() -> None:
    found = catalog_quantized("qwen/qwen3-30b-a3b")
    assert found == {
        "qwen3-30b-a3b-fp8": "Qwen/Qwen3-30B-A3B-FP8", "qwen3-30b-a3b-gptq": "Qwen/Qwen3-30B-A3B-GPTQ-Int4",
    }  # fmt: skip
    for name in found:
        config = catalog_config(name)
        assert (config.num_experts, config.hidden_size) == (128, 2048)
        assert config.quantization_config["quant_method"] == name.rpartition("-")[2]
    assert catalog_quantized("pythia-160m") == catalog_quantized("qwen3-30b-a3b-fp8") == {}
    assert catalog_quantized("no/such") == {}


def test_names_and_hub_ids_in_any_case() -> None:
    assert catalog_config("BLOOM-176B").n_layer == 70
    assert catalog_config("eleutherai/Pythia-160M").hidden_size == 768
    assert catalog_hub_id("llama-3.1-405b") == "meta-llama/Llama-3.1-405B"
    assert catalog_hub_id("nothing") is None


def test_a_name_that_is_not_there_brings_the_closest() -> None:
    with pytest.raises(ModelError, match="pythia-161m") as caught:
        catalog_config("EleutherAI/pythia-161m")
    assert "pythia-160m" in str(caught.value.hint)
    with pytest.raises(ModelError) as caught:
        catalog_config("???")
    assert "known: bart-large-cnn" in str(caught.value.hint)
