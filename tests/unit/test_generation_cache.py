"""The pooled KV cache gives the numbers of transformers' own, from memory that is allocated once."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import pytest
import torch
from small_models import SMALL_MODELS, VOCABULARY, build_model, small_config
from transformers import DynamicCache

from zeroinf.generation.cache import CachePool
from zeroinf.model.anatomy import Anatomy
from zeroinf.model.inspect import read_anatomy
from zeroinf.model.kv import held_bytes

CPU = torch.device("cpu")
ROWS, NEW = 3, 24
WINDOWED = ("cohere2", "exaone4", "gemma2", "gemma3_text", "gpt_oss", "mistral")


@cache
def model_of(name: str) -> Any:
    return build_model(name)


@cache
def anatomy_of(name: str) -> Anatomy:
    return read_anatomy(small_config(name))


def pool_of(name: str, rows: int, tokens: int) -> CachePool:
    """A pool that holds no number yet: whatever is read before it is written shows."""
    pool = CachePool(model_of(name), anatomy_of(name), rows=rows, tokens=tokens, device=CPU)
    pool._memory.fill_(0xFF)  # NaN in every floating dtype
    return pool


def logits_of(name: str, lent: Any, *, rows: int = ROWS, prompt: int = 7, new: int = NEW) -> torch.Tensor:
    """Logits of the last position of a prefill and of each greedy step after it; every row but the first is padded."""
    model = model_of(name)
    accepted = inspect.signature(model.forward).parameters
    cache_name = "cache_params" if "cache_params" in accepted else "past_key_values"
    ids = torch.arange(3, 3 + rows * prompt).reshape(rows, prompt) % VOCABULARY
    mask = (torch.arange(prompt) >= torch.arange(rows)[:, None]).long()
    feed, seen = ids, []
    with torch.no_grad():
        for _ in range(new):
            more = {"attention_mask": mask, "use_cache": True, cache_name: lent}
            if "position_ids" in accepted:
                more["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -feed.shape[1] :]
            seen.append(model(input_ids=feed, **more).logits[:, -1])
            feed = seen[-1].argmax(-1, keepdim=True)
            mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=-1)
    return torch.stack(seen)


def own_cache(name: str) -> DynamicCache:
    return DynamicCache(config=model_of(name).config.get_text_config(decoder=True))


@pytest.mark.parametrize("name", sorted(SMALL_MODELS))
def test_logits_equal_those_over_transformers_own_cache_bit_by_bit(name: str) -> None:
    lent = pool_of(name, ROWS + 1, 50).lend(ROWS, 7 + NEW)
    assert torch.equal(logits_of(name, lent), logits_of(name, own_cache(name)))


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("prompt", [15, 16, 17, 18, 19, 40])
def test_a_window_slides_the_same_from_prompts_around_its_width(name: str, prompt: int) -> None:
    lent = pool_of(name, ROWS, prompt + NEW).lend(ROWS, prompt + NEW)
    assert torch.equal(logits_of(name, lent, prompt=prompt), logits_of(name, own_cache(name), prompt=prompt))


@pytest.mark.parametrize("name", ["llama", "mistral", "jamba"])
def test_a_batch_finds_nothing_of_the_one_before(name: str) -> None:
    pool = pool_of(name, 5, 60)
    logits_of(name, pool.lend(5, 55), rows=5, prompt=20)
    for rows, prompt in ((2, 9), (5, 20), (1, 33)):
        found = logits_of(name, pool.lend(rows, prompt + NEW), rows=rows, prompt=prompt)
        assert torch.equal(found, logits_of(name, own_cache(name), rows=rows, prompt=prompt))


@pytest.mark.parametrize("name", ["llama", "mistral", "exaone4"])
def test_a_cache_that_was_reset_starts_anew(name: str) -> None:
    lent = pool_of(name, ROWS, 50).lend(ROWS, 50)
    logits_of(name, lent, prompt=20)
    lent.reset()
    assert lent.get_seq_length() == 0
    assert torch.equal(logits_of(name, lent), logits_of(name, own_cache(name)))


@pytest.mark.parametrize("name", sorted(SMALL_MODELS))
def test_the_pool_takes_the_bytes_that_the_anatomy_says_and_nothing_grows_beside_it(name: str) -> None:
    anatomy, tokens = anatomy_of(name), 7 + NEW
    pool = CachePool(model_of(name), anatomy, rows=ROWS, tokens=tokens, device=CPU)
    lent = pool.lend(ROWS, tokens)
    logits_of(name, lent)
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for layer in lent.layers
        for t in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if t is not None
    }
    pooled = any(layer.pooled for layer in anatomy.cache)
    assert held == ({pool._memory.untyped_storage().data_ptr(): pool.nbytes} if pooled else {})
    own = sum(held_bytes(vars(lent.layers[i])) for i, layer in enumerate(anatomy.cache) if not layer.pooled)
    assert pool.nbytes == anatomy.pool_bytes(ROWS, tokens)
    assert pool.nbytes + own == anatomy.cache_bytes(ROWS, tokens)


def test_a_window_takes_no_more_than_an_eighth_beyond_its_width() -> None:
    state = 2 * 2 * 16 * 4  # keys and values, two heads of 16, float32
    assert anatomy_of("mistral").pool_bytes(4, 10_000) == 3 * 4 * 18 * state
    assert anatomy_of("mistral").pool_bytes(4, 12) == 3 * 4 * 12 * state
    assert anatomy_of("llama").pool_bytes(4, 10_000) == 3 * 4 * 10_000 * state


def test_a_smaller_batch_lies_as_if_it_had_the_memory_to_itself() -> None:
    lent = pool_of("llama", 8, 100).lend(2, 10)
    logits_of("llama", lent, rows=2, prompt=4, new=7)
    assert lent.layers[0].keys.shape == (2, 2, 10, 16)
    assert all(layer.keys.is_contiguous() and layer.values.is_contiguous() for layer in lent.layers)


@pytest.mark.parametrize(("rows", "tokens"), [(4, 10), (3, 11)])
def test_more_than_the_pool_holds_is_refused(rows: int, tokens: int) -> None:
    with pytest.raises(ValueError, match=f"{rows} rows of {tokens} tokens from a pool of 3 rows of 10"):
        pool_of("llama", 3, 10).lend(rows, tokens)


def test_one_token_too_many_is_an_error_and_not_somebody_elses_memory() -> None:
    with pytest.raises(RuntimeError, match="exceeds dimension size"):
        logits_of("llama", pool_of("llama", ROWS, 50).lend(ROWS, 9), prompt=7, new=4)


@pytest.mark.parametrize("change", [{"dtype": torch.bfloat16}, {"heads": 1}, {"rows": 1}])
def test_states_of_another_kind_are_refused_rather_than_converted(change: dict[str, Any]) -> None:
    layer = pool_of("llama", ROWS, 50).lend(ROWS, 50).layers[0]
    states = torch.zeros(change.get("rows", ROWS), change.get("heads", 2), 4, 16, dtype=change.get("dtype"))
    with pytest.raises(RuntimeError, match="the cache was planned for 3 rows of 2 heads of 16"):
        layer.update(states, states)
