"""Which modules keep the states of recurrent layers, and whether prompts can be cut for them, is asked of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import RECURRENT_MODELS, small_config
from transformers.models.lfm2 import modeling_lfm2

from zeroinf.compat.states import StatesOfOneLayer
from zeroinf.model.cache_layout import PoolSize
from zeroinf.model.inspect import build_meta, read_anatomy
from zeroinf.model.kv import read_cache
from zeroinf.model.mixers import read_mixers

STUCK = {"falcon_mamba", "jamba", "mamba"}
"""transformers' own code for them begins each prompt with no state, whatever the cache holds."""


def test_each_recurrent_layer_names_its_module_and_whether_that_goes_on_from_a_state() -> None:
    for name in RECURRENT_MODELS:
        anatomy = read_anatomy(small_config(name), dtype="bfloat16")
        assert anatomy.mixers is not None, name
        assert anatomy.is_paged
        assert [bool(path) for path in anatomy.mixers.paths] == [bool(layer.states) for layer in anatomy.cache]
        assert anatomy.mixers.continues == (name not in STUCK), name
        assert bool(anatomy.whole_because) == (name in STUCK)
    assert read_anatomy(small_config("llama")).mixers is None


def test_states_have_a_slot_for_each_row() -> None:
    anatomy = read_anatomy(small_config("falcon_h1"), dtype="bfloat16")
    one, two = (PoolSize(rows=rows, tokens=64, pages=4) for rows in (1, 2))
    assert anatomy.pool_bytes(two) - anatomy.pool_bytes(one) == anatomy.state_bytes
    assert anatomy.state_bytes == sum(layer.fixed_bytes for layer in anatomy.cache)


def mixers(config: Any) -> Any:
    model = build_meta(config, "float32")
    return read_mixers(model, read_cache(model, 64))


def test_a_module_that_forgets_its_state_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    own = modeling_lfm2.Lfm2ShortConv.forward

    def forgets(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        for name, given in kwargs.items():
            if isinstance(given, StatesOfOneLayer):
                kwargs[name] = None
        return own(self, hidden_states, *args, **kwargs)

    assert mixers(small_config("lfm2")).continues
    forgets.__signature__ = __import__("inspect").signature(own)  # type: ignore[attr-defined]
    monkeypatch.setattr(modeling_lfm2.Lfm2ShortConv, "forward", forgets)
    assert not mixers(small_config("lfm2")).continues


def test_a_module_that_is_handed_more_than_hidden_states_is_left_to_transformers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own, convolves = modeling_lfm2.Lfm2DecoderLayer.forward, modeling_lfm2.Lfm2ShortConv.forward

    def takes_more(self: Any, *args: Any, positions: Any = None, **kwargs: Any) -> Any:
        return convolves(self, *args, **kwargs)

    takes_more.__signature__ = __import__("inspect").signature(convolves)  # type: ignore[attr-defined]

    def hands_more(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if hasattr(self, "conv"):
            more = {"positions": hidden_states}
            self.conv.register_forward_pre_hook(
                lambda module, args, given: (args, {**given, **more}), with_kwargs=True, prepend=True
            )
        return own(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(modeling_lfm2.Lfm2ShortConv, "forward", takes_more)
    monkeypatch.setattr(modeling_lfm2.Lfm2DecoderLayer, "forward", hands_more)
    assert mixers(small_config("lfm2")) is None
