"""Prompts that begin alike are computed once as far as they do, give the tokens that they give alone, and leave every
page of the KV cache behind them."""

from __future__ import annotations

import random
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from generating import PlainEngine, anatomy_of, desk_of, greedy_by_transformers, limits_of, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import build_model

from zeroinf.distributed.control import Control
from zeroinf.distributed.world import World
from zeroinf.generation.groups import Group
from zeroinf.generation.loop import Feed, generate
from zeroinf.generation.pass_limits import Limits
from zeroinf.generation.row import Row
from zeroinf.generation.scheduler import Scheduler
from zeroinf.planner.prefixes import PrefixGroups

PAGE = 16
VOCABULARY = 300
# Windows, attention sinks, soft caps, experts, all of the keys in a window, learned positions; and latent keys, which
# some releases of transformers let run packed.
ARCHITECTURES = ("llama", "gpt2", "gemma3_text", "gpt_oss", "mixtral", "qwen3_moe", "mistral", "gemma2", "opt", "phi3")
LATENT = "deepseek_v3"
ANATOMY = anatomy_of(build_model("llama"))
TIGHT: dict[str, Any] = {"rows": 5, "pages": 24, "prefill_tokens": 64, "forward_tokens": 33, "prefix_pages": 24}


def prompts_of(draw: random.Random, count: int) -> list[list[int]]:
    """Prompts of three headers, two of which begin alike, and some that are the same as others."""

    def tokens(count: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(count)]

    both = tokens(40)
    headers = (both + tokens(37), both + tokens(20), tokens(50))
    prompts = [draw.choice(headers) + tokens(draw.randrange(1, 30)) for _ in range(count)]
    return [*prompts, *prompts[:2], prompts[0]]


class Arrivals:
    """A feed of rows that come a few at a time, of which every third is cancelled at some time."""

    def __init__(self, rows: Sequence[Row], draw: random.Random, *, cancels: bool = False) -> None:
        self._left, self._draw, self._cancels = list(rows), draw, cancels
        self._come: list[Row] = []
        self.feed = Feed(take=self._take, done=lambda row: None, urgent=self._urgent, cancelled=self._cancelled)

    def _next(self, most: int) -> list[Row]:
        taken = [self._left.pop(0) for _ in range(min(len(self._left), most))]
        self._come += taken
        return taken

    def _take(self) -> list[Row] | None:
        return (self._next(self._draw.randrange(0, 6)) or None) if self._left else []

    def _urgent(self) -> list[Row]:
        rows = self._next(1) if self._draw.random() < 0.2 else []
        for row in rows:
            row.urgent = True
        return rows

    def _cancelled(self) -> list[Row]:
        if not self._cancels or self._draw.random() < 0.5:
            return []
        return [row for row in self._come if row.index % 3 == 0 and not row.finished][:1]


class Run:
    """Rows through the loop, and what is left of the KV cache then."""

    def __init__(self, engine: PlainEngine, rows: Sequence[Row], feed: Feed, /, **given: Any) -> None:
        limits = limits_of(engine.model, rows, **given)
        self.scheduler = Scheduler(limits, anatomy_of(engine.model).row_pages)
        self.batch_state = desk_of(engine.model, rows, limits)
        generate(engine, Control(World(), "cpu"), self.batch_state, self.scheduler, feed)

    @property
    def computed(self) -> int:
        """Prompt tokens."""
        return self.scheduler.counts.prefill_columns

    def check_pages(self) -> None:
        """Every page is free, or kept for prompts to come; these go as well when they are asked to."""
        assert self.scheduler.reserved_pages == 0
        for table in self.batch_state.pool._tables.values():
            assert not table._held
            assert len(table._shared) == self.scheduler.kept_pages
        self.scheduler.clear_prefixes()
        self.batch_state.open([], self.scheduler.take_dropped())
        assert self.scheduler.kept_pages == 0
        for table in self.batch_state.pool._tables.values():
            assert sorted(table._free) == list(range(1, len(table._free) + 1))
            assert len(table._free) == table._layer.pool_pages(self.batch_state.pool.size) - 1


def run(model: Any, rows: Sequence[Row], *, seed: int = 1, cancels: bool = False, **given: Any) -> Run:
    feed = Arrivals(rows, random.Random(seed), cancels=cancels).feed
    found = Run(PlainEngine(model), rows, feed, **{**TIGHT, **given})
    found.check_pages()
    return found


def are_greedy(model: Any, rows: Sequence[Row]) -> bool:
    return all(row.generated == greedy_by_transformers(model, row.prompt, row.generated) for row in rows)


@given(st.randoms(use_true_random=False), st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_prompts_that_begin_alike_follow_each_other_and_save_what_they_share(draw: random.Random, count: int) -> None:
    pages = [array("i", [number] * PAGE).tobytes() for number in range(3)]
    prompts = [b"".join(draw.choices(pages, k=draw.randrange(5))) + b"last" for _ in range(count)]
    beginnings = [tuple(prompt[: end * len(pages[0])] for end in range(1, 1 + len(prompt) // 64)) for prompt in prompts]
    groups = PrefixGroups(prompts)
    order = list(groups.order)
    assert sorted(order) == list(range(count))
    for beginning in {one for each in beginnings for one in each}:
        places = [at for at, number in enumerate(order) if beginning in beginnings[number]]
        assert places == list(range(places[0], places[-1] + 1))
    first_of: dict[bytes, int] = {}
    for number, beginning in enumerate(beginnings):
        first_of.setdefault(beginning[0] if beginning else b"%d" % number, number)
    firsts = [first_of[beginnings[at][0] if beginnings[at] else b"%d" % at] for at in order]
    assert firsts == sorted(firsts), "groups are in the order of their first prompts"
    rows = [(len(prompt) // 4, 1) for prompt in prompts]
    saved = sum(map(len, beginnings)) - len({one for each in beginnings for one in each})
    assert round(groups.shared(ANATOMY, rows).saved_tokens * count) == PAGE * saved


@pytest.mark.parametrize("name", [*ARCHITECTURES, LATENT])
def test_tokens_are_those_of_plain_transformers_with_and_without_sharing(name: str) -> None:
    model = build_model(name)
    if reason := anatomy_of(model).padded_because:
        assert name == LATENT
        pytest.skip(f"padded: {reason}")
    prompts, lengths = prompts_of(random.Random(5), 12), [1 + 3 * index % 8 for index in range(15)]
    found = {}
    for prefix_pages in (24, 0):
        rows = rows_of(prompts, lengths, ignore_eos=True)
        found[prefix_pages] = run(model, rows, prefix_pages=prefix_pages)
        assert are_greedy(model, rows)
    assert found[24].computed < 0.6 * found[0].computed
    assert found[24].computed + found[24].scheduler.counts.shared_tokens >= found[0].computed
    assert found[0].scheduler.counts.shared_tokens == 0


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_rows_that_come_at_any_time_and_are_cancelled_disturb_nobody_and_leave_no_page(name: str) -> None:
    model = build_model(name)
    for seed in range(4):
        draw = random.Random(seed)
        rows = rows_of(prompts_of(draw, 15), [draw.randrange(1, 14) for _ in range(18)], ignore_eos=True)
        run(model, rows, seed=seed, cancels=True, pages=draw.choice((12, 15, 24)))
        reasons = [row.finish_reason for row in rows]
        assert reasons.count("cancelled") > 1
        assert all(reason == "length" for row, reason in zip(rows, reasons, strict=True) if row.index % 3)
        assert are_greedy(model, [row for row in rows if row.generated])


def test_sampled_rows_draw_the_same_tokens_with_and_without_sharing() -> None:
    model, prompts, texts = build_model("llama"), [*prompts_of(random.Random(2), 9)], []
    for prefix_pages in (24, 0):
        rows = rows_of(prompts, 6, ignore_eos=True, temperature=0.9, seed=4)
        run(model, rows, prefix_pages=prefix_pages)
        texts.append([row.text for row in rows])
    assert texts[0] == texts[1]


class Tight(PlainEngine):
    """Some passes run out of memory."""

    def forward(self, micro_batches: Sequence[Mapping[str, Any]]) -> list[Any]:
        outputs = super().forward(micro_batches)
        if len(self.passes) in (1, 3, 4, 9):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return outputs


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_passes_that_run_out_of_memory_leave_what_is_shared_right(name: str) -> None:
    model = build_model(name)
    rows = rows_of(prompts_of(random.Random(8), 10), 5, ignore_eos=True)
    found = Run(Tight(model), rows, Arrivals(rows, random.Random(0)).feed, **TIGHT)
    found.check_pages()
    assert are_greedy(model, rows)
    assert found.scheduler.limits.forward_tokens < TIGHT["forward_tokens"]


class Flawed(PlainEngine):
    """The keys of a token are no numbers in the first forward that has it, as after a fault of memory."""

    def __init__(self, model: Any, token: int) -> None:
        super().__init__(model)
        self.is_flawed = False
        self._token, self._hook = token, model.get_input_embeddings().register_forward_hook(self._spoil)

    def _spoil(self, module: Any, given: Any, found: torch.Tensor) -> torch.Tensor:
        bad = given[0] == self._token
        if self.is_flawed or not bad.any():
            return found
        self.is_flawed = True
        return found.masked_fill(bad[..., None], float("nan"))


def test_a_shared_page_that_holds_what_is_no_number_is_computed_again_for_rows_that_come_later() -> None:
    model, draw = build_model("llama"), random.Random(3)
    header = [draw.randrange(3, 200) for _ in range(48)]
    header[20] = 299
    rows = rows_of([[*header, 3 + index] for index in range(8)], 4, ignore_eos=True)
    left = [rows[:2], rows[2:]]
    feed = Feed(take=lambda: left.pop(0) if left else [], done=lambda row: None)
    found = Run(engine := Flawed(model, 299), rows, feed, **{**TIGHT, "rows": 2})
    found.check_pages()
    assert engine.is_flawed
    assert [row.finish_reason for row in rows] == ["error"] * 2 + ["length"] * 6
    engine._hook.remove()
    assert are_greedy(model, rows[2:])
    assert found.computed < 3 * 48 + len(rows)


def test_samples_of_one_prompt_compute_it_once() -> None:
    model, rows = build_model("llama"), rows_of([list(range(5, 105))] * 8, 3, ignore_eos=True)
    left = [rows]
    feed = Feed(take=lambda: left.pop() if left else [], done=lambda row: None)
    found = Run(PlainEngine(model), rows, feed, **{**TIGHT, "pages": 40, "rows": 8})
    assert found.computed + found.scheduler.counts.shared_tokens == 800
    assert found.computed == 100 + 7 * 4
    assert are_greedy(model, rows)


def test_requests_that_come_one_after_the_other_share_what_the_first_two_have_in_common() -> None:
    model, header = build_model("llama"), list(range(10, 90))
    rows = rows_of([[*header, 100 + index, 5, 6] for index in range(6)], 2, ignore_eos=True)
    left = list(rows)
    feed = Feed(
        take=lambda: None if left else [],
        urgent=lambda: [left.pop(0)] if left and all(row.finished for row in rows[: -len(left)]) else [],
        done=lambda row: None,
    )
    found = Run(PlainEngine(model), rows, feed, **TIGHT)
    found.check_pages()
    assert found.computed == 2 * 83 + 4 * 3
    assert are_greedy(model, rows)


def test_prefixes_go_least_recently_used_first_and_never_keep_a_row_out() -> None:
    rows = rows_of([[*[header] * 48, 1 + index % 2] for header in range(10, 16) for index in range(2)], 8)
    scheduler = Scheduler(Limits(**{**LIMITS, "rows": 2, "pages": 7, "prefix_pages": 7}), pages_of)
    for at in range(0, len(rows), 2):
        scheduler.add(rows[at : at + 2])
        _finish(scheduler)
        assert scheduler.kept_pages == (3 if at == 0 else 5), "as many as there was room for beside the last two rows"
    last = rows_of([[15] * 48 + [3], [14] * 48 + [3], [10] * 48 + [3]], 1)
    shared = []
    for row in last:
        scheduler.add([row])
        before = scheduler.counts.shared_tokens
        _finish(scheduler)
        shared.append(scheduler.counts.shared_tokens - before)
    assert shared == [48, 32, 0], "the last page of a prefix goes first"
    scheduler.add(rows_of([list(range(20, 124))], 8))  # takes the whole pool
    _finish(scheduler)
    assert (scheduler.reserved_pages, scheduler.kept_pages) == (0, 0)


def _finish(scheduler: Scheduler) -> None:
    scheduler.admit()
    while groups := scheduler.next_pass():
        for group in groups:
            scheduler.advance(group)
        scheduler.admit()


def test_rows_that_begin_alike_follow_each_other_wherever_they_stand_among_those_that_come() -> None:
    rows = rows_of([[header] * 32 + [index] for index in range(4) for header in (7, 9, 8)], 1)
    scheduler = Scheduler(Limits(**{**LIMITS, "rows": 4, "pages": 6, "prefix_pages": 6}), pages_of)
    scheduler.add(rows)
    _finish(scheduler)
    assert scheduler.counts.prefill_columns <= 3 * 33, "each header once, though there is room for one at a time"


def test_two_thousand_prompts_of_one_header_compute_a_fifteenth_of_their_tokens() -> None:
    draw = random.Random(0)
    header, own = [draw.randrange(VOCABULARY) for _ in range(1500)], range(100)
    rows = rows_of([[*header, *(draw.randrange(VOCABULARY) for _ in own)] for _ in range(2000)], 1)
    size = {"rows": 64, "pages": 64 * 101, "micro_batch_rows": 64, "prefill_tokens": 2048, "forward_tokens": 2112}
    scheduler = Scheduler(Limits(**size, prefix_pages=64 * 101), pages_of)
    for start in range(0, len(rows), 64):
        scheduler.add(rows[start : start + 64])
        _finish(scheduler)
    assert scheduler.counts.prefill_columns == 1600 + 1999 * (1600 - 1500 // PAGE * PAGE)
    assert scheduler.counts.prefill_columns + scheduler.counts.shared_tokens == 2000 * 1600


LIMITS: dict[str, Any] = {"rows": 4, "pages": 40, "micro_batch_rows": 4, "prefill_tokens": 60, "forward_tokens": 25}


def pages_of(tokens: int) -> int:
    return -(-tokens // PAGE)


texts = st.lists(st.sampled_from([b"a" * 20, b"b" * 16, b"c" * 7, b"d" * 33, b"e"]), min_size=1, max_size=5)
jobs = st.lists(st.tuples(texts, st.integers(1, 9)), min_size=1, max_size=16)
shapes = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 6),
        "pages": st.integers(12, 40),
        "micro_batch_rows": st.integers(1, 4),
        "prefill_tokens": st.integers(1, 90),
        "forward_tokens": st.integers(1, 60),
        "prefix_pages": st.integers(1, 40),
        "entering_rows": st.integers(1, 4),
    }
)


class Books:
    """What has been written, and where: what a forward reads must have been written in another one before."""

    def __init__(self) -> None:
        self.shared: dict[Any, set[int]] = {}
        self.own: dict[Any, set[int]] = {}

    def forward(self, group: Group) -> None:
        new = []
        for seat, start, count in zip(group.seats, group.starts, group.counts, strict=True):
            for at in range(start):
                assert at % PAGE in self._of(seat, at, PAGE) if at < seat.prefix_tokens else at in self._own(seat)
            new += [(seat, at) for at in range(start, start + count)]
        for seat, at in new:
            if at < seat.prefix_tokens:
                self._of(seat, at, PAGE).add(at % PAGE)
            else:
                self._own(seat).add(at)

    def _of(self, seat: Any, at: int, page: int) -> set[int]:
        return self.shared.setdefault(seat.prefix[at // page], set())

    def _own(self, seat: Any) -> set[int]:
        return self.own.setdefault(seat, set())


@settings(deadline=None)
@given(jobs, shapes, st.randoms(use_true_random=False))
def test_nothing_is_read_before_it_is_written_whatever_comes_and_goes(
    jobs: list[tuple[list[bytes], int]], shape: dict[str, int], draw: random.Random
) -> None:
    rows = rows_of([list(b"".join(parts)) for parts, _ in jobs], [new for _, new in jobs])
    scheduler, books, left, ended = Scheduler(Limits(**shape), pages_of), Books(), list(rows), 0
    for _ in range(3000):
        if left and scheduler.wants_rows:
            scheduler.add([left.pop(0) for _ in range(min(len(left), draw.randrange(1, 6)))])
        scheduler.admit()
        assert scheduler.reserved_pages + scheduler.kept_pages <= shape["pages"]
        assert scheduler._prefixes.pages <= shape["prefix_pages"]
        scheduler.take_dropped()
        if draw.random() < 0.1 and scheduler.seats:
            scheduler.withdraw(draw.choice(scheduler.seats).row)
            ended += 1
        if draw.random() < 0.05 and scheduler.seats:
            scheduler.forget_prefix(draw.choice(scheduler.seats))
        groups = scheduler.next_pass()
        if not (groups or left or scheduler.seats or scheduler._waiting):
            break
        if draw.random() < 0.05 and groups and scheduler.can_halve(groups):
            scheduler.halve(groups)
            continue
        for group in groups:
            books.forward(group)
        for group in groups:
            ended += len(scheduler.advance(group))
    assert ended == len(rows)
    assert scheduler.reserved_pages == 0


def test_limits_refuse_to_share_where_keys_do_not_stay_in_pages() -> None:
    for other in ({"forward_tokens": 0}, {"host_tokens": 10}, {"breaks_at": 8}):
        with pytest.raises(ValueError, match="prefixes are shared"):
            Limits(**{**LIMITS, "prefix_pages": 1, **other})
