"""Pages give the keys and values that transformers' own cache would, from memory that is allocated once."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from generating import CPU, PlainEngine, greedy_by_transformers, rows_of, run_rows
from small_models import build_model, small_config
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from zeroinf.generation.cache import PagePool, columns_of
from zeroinf.model.cache_layout import PAGE_TOKENS, PoolSize
from zeroinf.model.inspect import read_anatomy

HEADS, WIDTH = 2, 16
SIZE = PoolSize(rows=4, tokens=60, pages=14)


def pool_of(window: int | None, size: PoolSize = SIZE) -> PagePool:
    """A pool for the small Llama, or Mistral with a window, that holds no number yet: what is read too soon shows."""
    config = small_config("llama" if window is None else "mistral")
    if window is not None:
        config.sliding_window = window
    model = type("Model", (), {"config": config})()
    pool = PagePool(model, read_anatomy(config), size, CPU)
    for states in pool._states:
        for memory in states:
            memory[1:] = float("nan")
    return pool


class Twin:
    """Rows in a pool, and each of them alone in transformers' own cache."""

    def __init__(self, window: int | None, seed: int) -> None:
        self.pool, self.window, self.random = pool_of(window), window, random.Random(seed)
        self.own: dict[int, Any] = {}
        self.lengths: dict[int, int] = {}
        torch.manual_seed(seed)

    def enter(self, seat: int, tokens: int) -> None:
        self.pool.open({seat: tokens})
        self.own[seat] = DynamicLayer() if self.window is None else DynamicSlidingWindowLayer(self.window)
        self.lengths[seat] = 0

    def leave(self, seat: int) -> None:
        self.pool.close([seat])
        del self.own[seat], self.lengths[seat]

    def forward(self, counts: dict[int, int]) -> None:
        """Let rows of `counts` get so many tokens, and compare what attention would see of them."""
        seats, new = list(counts), max(counts.values())
        columns = columns_of(seats, [self.lengths[seat] for seat in seats], list(counts.values()), CPU)
        layer = self.pool.page(self.pool.new_cache(), columns).layers[1]
        states = torch.randn(2, len(seats), HEADS, new, WIDTH)
        assert layer.get_seq_length() == columns.total - new
        seen, offset = layer.get_mask_sizes(new)
        found = layer.update(*states)
        assert [tensor.shape for tensor in found] == [(len(seats), HEADS, seen, WIDTH)] * 2
        assert seen + offset == columns.total
        assert all(tensor.isfinite().all() for tensor in found)
        for row, seat in enumerate(seats):
            expected = self.own[seat].update(*(each[row : row + 1, :, new - counts[seat] :] for each in states))
            for mine, theirs in zip(found, expected, strict=True):
                assert torch.equal(mine[row, :, seen - theirs.shape[2] :], theirs[0])
            self.lengths[seat] += counts[seat]


@pytest.mark.parametrize("window", [None, 15, 16, 17, 40])
def test_rows_that_come_go_and_change_neighbours_see_what_they_would_see_alone(window: int | None) -> None:
    for seed in range(4):
        twin, ends = Twin(window, seed), dict[int, int]()
        for _ in range(60):
            for seat in range(SIZE.rows):
                if seat in ends and twin.lengths[seat] == ends[seat]:
                    twin.leave(seat)
                    del ends[seat]
                elif seat not in ends and sum(-(-end // PAGE_TOKENS) for end in ends.values()) <= SIZE.pages - 4:
                    ends[seat] = twin.random.randint(1, SIZE.tokens)
                    twin.enter(seat, ends[seat])
            waiting = [seat for seat in ends if twin.lengths[seat] < ends[seat]]
            chosen = twin.random.sample(waiting, twin.random.randint(1, len(waiting))) if waiting else []
            longest = twin.random.choice((1, 1, 3, 20, 60))
            if chosen:
                twin.forward({seat: min(longest, ends[seat] - twin.lengths[seat]) for seat in chosen})


@pytest.mark.parametrize("name", ["llama", "mistral", "exaone4", "jamba", "mamba", "deepseek_v3"])
def test_the_pool_takes_the_bytes_that_the_anatomy_says(name: str) -> None:
    anatomy = read_anatomy(small_config(name))
    pool = PagePool(build_model(name), anatomy, SIZE, CPU)
    assert pool.nbytes == anatomy.pool_bytes(SIZE)
    own = [memory for states in pool._states for memory in states]
    own += [] if pool.states is None else [pool.states._memory]
    assert sum(memory.nbytes for memory in own) == pool.nbytes


def test_a_window_takes_no_more_pages_than_its_width() -> None:
    state = 2 * HEADS * WIDTH * 4 * PAGE_TOKENS  # keys and values of a page, float32
    mistral, llama = (read_anatomy(small_config(name)) for name in ("mistral", "llama"))
    assert mistral.pool_bytes(PoolSize(rows=4, tokens=10_000, pages=2500)) == 3 * 5 * state
    assert mistral.pool_bytes(PoolSize(rows=4, tokens=12, pages=3)) == 3 * 4 * state
    assert llama.pool_bytes(PoolSize(rows=4, tokens=10_000, pages=2500)) == 3 * 2501 * state
    assert (mistral.row_pages(10_000), llama.row_pages(10_000), llama.row_pages(17)) == (1, 625, 2)


@pytest.mark.parametrize("change", [{"dtype": torch.bfloat16}, {"heads": 1}, {"rows": 1}])
def test_states_of_another_kind_are_refused_rather_than_converted(change: dict[str, Any]) -> None:
    pool = pool_of(None)
    pool.open({0: 10, 1: 10})
    layer = pool.page(pool.new_cache(), columns_of([0, 1], [0, 0], [4, 4], CPU)).layers[0]
    states = torch.zeros(change.get("rows", 2), change.get("heads", HEADS), 4, WIDTH, dtype=change.get("dtype"))
    with pytest.raises((RuntimeError, IndexError)):
        layer.update(states, states)


def test_thousands_of_rows_leave_nothing_behind() -> None:
    pool = pool_of(40)
    free = {window: sorted(table._free) for window, table in pool._tables.items()}
    for number in range(3000):
        pool.open({number % SIZE.rows: 1 + number % SIZE.tokens})
        if number >= 2:
            pool.close([(number - 2) % SIZE.rows])
    pool.close([2998 % SIZE.rows, 2999 % SIZE.rows])
    assert {window: sorted(table._free) for window, table in pool._tables.items()} == free


@pytest.mark.parametrize("prompt", [15, 16, 17, 33])
def test_a_window_slides_the_same_from_prompts_around_its_width(prompt: int) -> None:
    model = build_model("gemma2")
    rows = rows_of([[5 + i] * prompt for i in range(3)], 8, ignore_eos=True)
    run_rows(PlainEngine(model), rows, prefill_tokens=11, micro_batch_rows=2)
    assert [row.generated for row in rows] == [greedy_by_transformers(model, row.prompt, row.generated) for row in rows]
