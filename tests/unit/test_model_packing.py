"""Models say by themselves whether their forwards can be packed, and why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import PACKED_MODELS, PADDED_MODELS, small_config
from transformers import Llama4TextConfig
from transformers.models.llama import modeling_llama

from zeroinf.model.inspect import read_anatomy


def reason(config: Any) -> str:
    return read_anatomy(config, dtype="float32").padded_because


def test_every_small_model_packs_but_those_that_are_named() -> None:
    found: dict[str, set[str]] = {}
    for name in (*PACKED_MODELS, *(name for names in PADDED_MODELS.values() for name in names)):
        found.setdefault(reason(small_config(name)), set()).add(name)
    assert sorted(found.pop("")) == PACKED_MODELS
    assert found == PADDED_MODELS


def test_an_encoder_is_not_packed() -> None:
    assert reason(small_config("bart")) == "an encoder reads its prompts"


def test_attention_in_chunks_is_not_taken_for_a_window() -> None:
    config = Llama4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, intermediate_size_mlp=32, num_hidden_layers=4, head_dim=16,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2, max_position_embeddings=256,
        attention_chunk_size=16, pad_token_id=0,
    )  # fmt: skip
    assert reason(config) == "it makes attention masks of its own"


def hands_a_bias(attend: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: attend(*args, **kwargs, position_bias=torch.zeros(1))


def scales_keys(attend: Callable[..., Any]) -> Callable[..., Any]:
    return lambda module, query, key, *args, **kwargs: attend(module, query, key * 2, *args, **kwargs)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (hands_a_bias, "it hands position_bias to attention"),
        (scales_keys, "it changes keys and values after they are cached"),
    ],
)
def test_what_attention_does_not_understand_is_named(
    change: Callable[..., Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = modeling_llama.ALL_ATTENTION_FUNCTIONS
    interface = type("Interface", (), {"get_interface": lambda self, *names: change(own.get_interface(*names))})
    monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", interface())
    config = small_config("llama")
    config.vocab_size += 1 + len(expected)  # a config that was read before is not read again
    assert reason(config) == expected
