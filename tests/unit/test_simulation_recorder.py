"""What is recorded of code on the meta device, for code short enough to count by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorded import Recorded, cut
from torch import nn

from zeroinf.planner.allocator import Event
from zeroinf.planner.workload import Kernel
from zeroinf.simulation.recorder import Recorder, storages_of

META = torch.device("meta")


def model_of(*blocks: nn.Module) -> nn.Sequential:
    return nn.Sequential(*blocks).to(META)


def record(
    act: Callable[..., Any], model: nn.Module | None = None, times: tuple[float, ...] = ()
) -> tuple[Recorded, Any]:
    """What is recorded of `act(model)`, and what it returned, which is alive then."""
    model = model_of() if model is None else model
    recorder = Recorder(storages_of(model), list(model.children())[: len(times)])
    with torch.no_grad(), recorder:
        result = act(model)
        step = cut(recorder, times)
    return step, result


def sizes(step: Recorded) -> list[int]:
    return [event.nbytes for event in step.events if event.nbytes is not None]


def kernels(step: Recorded) -> list[Kernel]:
    return [kernel for group in step.kernels for kernel in group.kernels]


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


def test_each_new_tensor_is_an_allocation_of_its_bytes() -> None:
    step, alive = record(lambda model: (empty(3, 5), empty(7, dtype=torch.bfloat16), empty(0)))
    assert sizes(step) == [60, 14, 0]
    assert len(alive) == 3
    assert len(step.events) == 3, "none has ended"


def test_views_are_no_allocations_and_keep_what_they_show_alive() -> None:
    def act(model: nn.Module) -> torch.Tensor:
        whole = empty(4, 8)
        return whole.view(2, 16).transpose(0, 1)[3:].expand(2, 13, 2)

    step, shown = record(act)
    assert step.events == (Event(1, 128),)
    assert kernels(step) == []
    assert shown.shape == (2, 13, 2)


def test_what_is_let_go_ends_in_the_order_it_was_let_go() -> None:
    def act(model: nn.Module) -> None:
        first, second = empty(1), empty(2)
        kept = second[:1]
        del second, first
        third = empty(3)
        del kept, third

    step, _ = record(act)
    assert step.events == (Event(1, 4), Event(2, 8), Event(1), Event(3, 12), Event(2), Event(3))


def test_in_place_operations_run_but_allocate_nothing() -> None:
    def act(model: nn.Module) -> torch.Tensor:
        value = empty(4, 8)
        return value.add_(1).mul_(value)

    step, _ = record(act)
    assert sizes(step) == [128]
    assert [kernel.nbytes for kernel in kernels(step)] == [2 * 128, 3 * 128]


def test_what_the_model_holds_was_there_before() -> None:
    model = model_of(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16))
    step, _ = record(lambda model: [*model.parameters(), *model.buffers(), model[0].weight.view(-1)], model)
    assert step.events == ()


def test_a_product_counts_its_operations_and_the_bytes_it_touches() -> None:
    model = model_of(nn.Linear(8, 16, bias=False))
    step, _ = record(lambda model: model(empty(4, 8)), model)
    assert sizes(step) == [4 * 8 * 4, 4 * 16 * 4]
    assert kernels(step) == [Kernel(2 * 4 * 8 * 16, 4 * (4 * 8 + 8 * 16 + 4 * 16), "mm", "crossed")]


def test_what_is_expanded_is_read_once() -> None:
    step, _ = record(lambda model: empty(1, 1, 10).expand(100, 100, 10) + 1)
    assert kernels(step)[0].nbytes == 40 + 4 * 100 * 100 * 10


def test_kernels_belong_to_the_block_that_runs_and_count_as_often_as_it_stands_for() -> None:
    model = model_of(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 2, bias=False))
    step, _ = record(lambda model: model(empty(1, 8)).neg(), model, times=(3.0, 5.0))
    assert [(group.times, [kernel.flops for kernel in group.kernels]) for group in step.kernels] == [
        (1.0, [2 * 8 * 2, 0]),  # the third layer is no block
        (3.0, [2 * 8 * 8]),
        (5.0, [2 * 8 * 8]),
    ]


def test_a_cut_begins_anew_and_ends_are_known_by_the_key_of_their_beginning() -> None:
    recorder = Recorder(storages_of(model_of()), [])
    with recorder:
        value = empty(5) + 1
        first = cut(recorder)
        del value
        second = cut(recorder)
    assert first.events[-1] == Event(1) and len(kernels(first)) == 1
    assert second.events == (Event(2),) and kernels(second) == []


def test_values_that_code_asks_for_are_zero_and_reach_the_host_as_zeros() -> None:
    def act(model: nn.Module) -> tuple[Any, ...]:
        value = empty(3, dtype=torch.int64)
        return value.sum().item(), bool((value > 1).any()), value.to("cpu", non_blocking=True), value.tolist()

    _, (number, flag, host, listed) = record(act)
    assert (number, flag, host.tolist(), host.device.type, listed) == (0, False, [0, 0, 0], "cpu", [0, 0, 0])


def test_host_tensors_are_not_counted() -> None:
    step, _ = record(lambda model: torch.zeros(100) + 1)
    assert step.events == ()


def test_a_masked_softmax_holds_a_byte_an_element_for_itself() -> None:
    step, _ = record(lambda model: torch.ops.aten._safe_softmax(empty(4, 8), -1))
    assert step.events[1:4] == (Event(2, 128), Event(3, 32), Event(3))


@pytest.mark.parametrize(("dtype", "padded"), [(torch.float32, 12), (torch.bfloat16, 16), (torch.float16, 16)])
def test_a_grouped_product_is_padded_to_16_bytes_in_every_dtype(dtype: torch.dtype, padded: int) -> None:
    def act(model: nn.Module) -> torch.Tensor:
        rows, weights = empty(7, 8, dtype=dtype), empty(3, 8, 10, dtype=dtype)
        return torch.nn.functional.grouped_mm(rows, weights, offs=empty(3, dtype=torch.int32))

    step, out = record(act)
    assert out.shape == (7, 10)
    assert sizes(step)[-1] == 7 * padded * dtype.itemsize
    assert kernels(step)[-1].flops == 2 * 7 * 8 * 10


def test_nothing_of_it_stays_with_the_model() -> None:
    model = model_of(nn.Linear(8, 8), nn.Linear(8, 8))
    record(lambda model: model(empty(1, 8)), model, times=(1.0, 1.0))
    assert all(not block._forward_hooks and not block._forward_pre_hooks for block in model)


@pytest.mark.parametrize(
    ("act", "pattern"),
    [
        (lambda: empty(4, 8) + empty(4, 8), "straight"),
        (lambda: empty(4, 8) * 2.0, "straight"),
        (lambda: empty(4, 8).to(torch.bfloat16), "converted"),
        (lambda: empty(4, 8) + empty(8), "crossed"),
        (lambda: empty(4, 8).transpose(0, 1).contiguous(), "crossed"),
        (lambda: empty(1, 8).expand(4, 8).clone(), "repeated"),
    ],
)
def test_how_a_kernel_goes_over_its_tensors(act: Callable[[], torch.Tensor], pattern: str) -> None:
    step, _ = record(lambda model: act())
    assert kernels(step)[-1].pattern == pattern


def test_rows_of_a_table_count_as_they_are_read_and_what_only_reserves_memory_is_no_kernel() -> None:
    table, numbers = empty(1000, 8), torch.empty(3, dtype=torch.int64, device=META)
    step, _ = record(lambda model: torch.nn.functional.embedding(numbers, table).new_empty(5))
    assert [(kernel.operator, kernel.nbytes) for kernel in kernels(step)] == [("embedding", 3 * 8 + 2 * 3 * 8 * 4)]
