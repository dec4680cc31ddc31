"""The guard of a GPU: its limit, and what it finds when a neighbour takes memory that was planned with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from fake_gpu import GIB, FakeGpu
from hypothesis import given
from hypothesis import strategies as st
from small_models import small_config

from zeroinf.errors import DoesNotFitError
from zeroinf.generation.pass_limits import Limits
from zeroinf.model.cache_layout import HostSize
from zeroinf.model.inspect import read_anatomy
from zeroinf.planner.allocator import LARGE_PAGE_BYTES
from zeroinf.planner.memory import SMALL_PAGES, Term
from zeroinf.planner.plan import Plan
from zeroinf.planner.timing import Resource, Timing
from zeroinf.service import gpu_memory
from zeroinf.service.gpu_memory import GpuMemory, GpuUse

DEVICE = torch.device("cuda", 0)
ROWS = 16
CONTEXT, COLLECTIVES, UNFORESEEN = GIB // 2, GIB // 4, GIB // 8
WEIGHTS, CACHE, ACTIVATIONS = 10 * GIB, 4 * GIB, 2 * GIB
TERMS = {
    "resident layers": WEIGHTS,
    "KV cache": CACHE,
    "activations, logits, states": ACTIVATIONS,
    "CUDA context": CONTEXT,
    "collectives' buffers": COLLECTIVES,
    "unforeseen": UNFORESEEN,
}
NEEDED = WEIGHTS + CACHE + ACTIVATIONS
PLAN = Plan(
    anatomy=read_anatomy(small_config("llama")),
    engine="stream",
    offload="none",
    dtype="bfloat16",
    device="cuda",
    world_size=1,
    batch_size=ROWS,
    prompt_tokens=40,
    new_tokens=24,
    pool_pages=4 * ROWS,
    terms=(*(Term("gpu", name, nbytes, "counted") for name, nbytes in TERMS.items()), Term("host", "all", 9, "given")),
)


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    """Full but for what the plan needs, the CUDA context of this process there already."""
    with pytest.MonkeyPatch.context() as patch:
        found = FakeGpu()
        found.install(patch)
        found.context = CONTEXT
        found.neighbours = found.total - CONTEXT - NEEDED
        yield found


def guard(limit_bytes: int | None = None, plan: Plan = PLAN) -> GpuMemory:
    return GpuMemory(plan, DEVICE, limit_bytes)


def load(gpu: FakeGpu) -> None:
    gpu.reserved = gpu.allocated = WEIGHTS


def test_what_the_plan_needs_is_enough(gpu: FakeGpu) -> None:
    guarded = guard()
    guarded.check()
    load(gpu)
    assert guarded.plan_that_fits().batch_size == ROWS


def test_a_gpu_s_process_computes_with_few_threads_on_the_cpu_until_its_end(gpu: FakeGpu) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(8)
        guarded = guard()
        assert torch.get_num_threads() == 2
        guarded.close()
        assert torch.get_num_threads() == 8
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("taken", [GIB // 4, 3 * GIB])
def test_a_neighbour_that_takes_memory_before_loading_is_named_with_how_much_is_missing(
    taken: int, gpu: FakeGpu
) -> None:
    guarded = guard()
    gpu.neighbours += taken
    with pytest.raises(DoesNotFitError) as caught:
        guarded.check()
    assert caught.value.exit_code == 3
    assert f"GPU 0 lacks {taken / GIB:.2f} GiB of what the plan needs" in caught.value.message
    assert "another process has taken memory" in caught.value.message
    assert "run it again" in (caught.value.hint or "")


@given(taken=st.integers(1, CACHE + ACTIVATIONS))
def test_rows_that_still_fit_beside_a_neighbour_really_fit(taken: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        gpu = FakeGpu()
        gpu.install(patch)
        gpu.context, gpu.neighbours = CONTEXT, gpu.total - CONTEXT - NEEDED
        guarded = guard()
        load(gpu)
        gpu.neighbours += taken
        left, a_row = gpu.total - gpu.used, (CACHE + ACTIVATIONS) / ROWS
        try:
            rows = guarded.plan_that_fits().batch_size
        except DoesNotFitError:
            assert left < a_row
            return
        assert 1 <= rows < ROWS
        assert rows * a_row <= left < (rows + 1) * a_row


def test_with_fewer_rows_a_pass_is_smaller_by_as_much_and_as_many_groups_of_rows_enter() -> None:
    """3 rows do not wait for each other where 4 of 16 should enter together: that would be a static batch."""
    timing = Timing(
        load_s=1, prefill_s=1, decode_s=1, tokens_per_second=1, streamed_bytes=1, fetched_bytes=1, binds="link",
        entering_rows=4,
    )  # fmt: skip
    plan = replace(PLAN, timing=timing, micro_batch_rows=8, prefill_tokens=160)
    limits = [Limits.of(plan.with_rows(rows), shares_passes=True, breaks_at=None) for rows in (16, 8, 3, 1)]
    assert [(each.entering_rows, each.micro_batch_rows, each.prefill_tokens) for each in limits] == [
        (4, 8, 160),
        (2, 4, 80),
        (1, 1, 30),
        (1, 1, 10),
    ]


def test_passes_begin_ahead_where_a_gpu_bounds_them_and_not_where_a_link_or_the_host_does() -> None:
    timing = Timing(
        load_s=1, prefill_s=1, decode_s=1, tokens_per_second=1, streamed_bytes=1, fetched_bytes=1, binds="link"
    )

    def runs_ahead(binds: Resource, **changes: Any) -> bool:
        plan = replace(PLAN, timing=replace(timing, binds=binds), **changes)
        return Limits.of(plan, shares_passes=True, breaks_at=None).runs_ahead

    every = get_args(Resource)
    assert {binds for binds in every if runs_ahead(binds)} == {"arithmetic", "GPU memory", "kernel launches"}
    assert not any(runs_ahead(binds, device="cpu") for binds in every)


def test_fewer_rows_keep_the_room_that_staging_has_for_those_in_host_memory() -> None:
    host = HostSize(tokens=400, seen_columns=4 * 64, new_columns=64)
    plan = replace(PLAN, micro_batch_rows=8, host_rows=4, host=host)
    assert plan.with_rows(8).host == host


def test_what_the_plan_needs_is_taken_to_the_page_once_weights_are_loaded(gpu: FakeGpu) -> None:
    guarded = guard()
    load(gpu)
    guarded.plan_that_fits()
    assert NEEDED - LARGE_PAGE_BYTES < gpu.reserved <= NEEDED
    guarded.plan_that_fits()
    assert gpu.reserved <= NEEDED


def test_room_is_left_for_the_pages_of_small_tensors(gpu: FakeGpu) -> None:
    plan = replace(PLAN, terms=(*PLAN.terms, Term("gpu", SMALL_PAGES, GIB, "simulated")))
    gpu.neighbours -= GIB
    guarded = guard(plan=plan)
    load(gpu)
    guarded.plan_that_fits()
    assert gpu.reserved <= NEEDED


def test_an_engine_whose_allocations_are_not_replayed_takes_memory_as_it_comes(gpu: FakeGpu) -> None:
    guarded = guard(plan=replace(PLAN, engine="zero"))
    load(gpu)
    guarded.plan_that_fits()
    assert gpu.reserved == WEIGHTS


def test_what_was_taken_ahead_is_not_said_to_have_been_allocated(gpu: FakeGpu) -> None:
    guarded = guard()
    load(gpu)
    gpu.most_allocated = 12 * GIB
    guarded.plan_that_fits()
    assert guarded.use(0, 0).allocated == 12 * GIB
    gpu.most_allocated = 14 * GIB
    assert guarded.use(0, 0).allocated == 14 * GIB


def test_no_row_beside_a_neighbour_is_refused_with_how_much_is_missing(gpu: FakeGpu) -> None:
    guarded = guard()
    load(gpu)
    gpu.neighbours += CACHE + ACTIVATIONS
    with pytest.raises(DoesNotFitError, match=r"lacks 6\.00 GiB"):
        guarded.plan_that_fits()


def test_no_row_is_refused_though_memory_comes_back_at_the_next_look(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded = guard()
    load(gpu)
    gpu.neighbours += CACHE + ACTIVATIONS
    look = torch.cuda.mem_get_info

    def leaving(device: torch.device) -> tuple[int, int]:
        found = look(device)
        gpu.neighbours = 0
        return found

    monkeypatch.setattr(torch.cuda, "mem_get_info", leaving)
    with pytest.raises(DoesNotFitError, match=r"lacks 6\.00 GiB"):
        guarded.plan_that_fits()


@pytest.mark.parametrize(("limit", "fraction"), [(24 * GIB, (24 - 0.75) / 80), (96 * GIB, 1.0)])
def test_torch_is_held_to_the_limit_less_what_lies_outside_it(limit: int, fraction: float, gpu: FakeGpu) -> None:
    guard(limit)
    assert gpu.limit == pytest.approx(fraction)


def test_without_a_limit_nothing_is_enforced(gpu: FakeGpu) -> None:
    guard()
    assert gpu.limit is None


def test_the_last_to_close_gives_the_allocators_settings_back(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:200")
    first, second = guard(), guard(24 * GIB)
    first.close()
    assert gpu.settings == ["expandable_segments:True"] * 2
    second.close()
    second.close()
    assert gpu.settings[2:] == ["max_split_size_mb:200,expandable_segments:False"]
    assert gpu.limit == 1.0


def test_a_start_that_fails_gives_them_back_too(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(plan: Plan, device: torch.device) -> None:
        raise torch.OutOfMemoryError("no memory, the test says")

    monkeypatch.setattr(gpu_memory, "_start_libraries", fail)
    with pytest.raises(torch.OutOfMemoryError):
        guard()
    assert [settings.rpartition(":")[2] for settings in gpu.settings] == ["True", "False"]


def test_a_limit_that_the_plan_fills_leaves_its_rows(gpu: FakeGpu) -> None:
    gpu.neighbours = 0
    guarded = guard(NEEDED + CONTEXT + COLLECTIVES)
    guarded.check()
    load(gpu)
    assert guarded.plan_that_fits().batch_size == ROWS


def test_a_limit_below_the_plan_costs_rows_although_the_gpu_has_more(gpu: FakeGpu) -> None:
    gpu.neighbours = 0
    guarded = guard(NEEDED + CONTEXT + COLLECTIVES - 3 * GIB)
    load(gpu)
    assert guarded.plan_that_fits().batch_size == ROWS // 2


def test_what_a_run_took_is_told_apart(gpu: FakeGpu) -> None:
    gpu.context = gpu.neighbours = 0
    guarded = guard()
    gpu.context = CONTEXT
    load(gpu)
    guarded.plan_that_fits()
    gpu.reserved, gpu.most_allocated, gpu.most_reserved = 15 * GIB, 14 * GIB, 17 * GIB
    assert guarded.use(slot_bytes=3, cache_bytes=5) == GpuUse(
        loaded=WEIGHTS, slots=3, cache=5, allocated=14 * GIB, reserved=17 * GIB, process=CONTEXT + 15 * GIB
    )


def test_where_nvml_does_not_tell_the_rest_is_reported(gpu: FakeGpu) -> None:
    gpu.nvml = False
    assert guard().use(0, 0).process is None
