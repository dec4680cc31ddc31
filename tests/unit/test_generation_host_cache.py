"""Keys and values in host memory: the tokens are those of rows whose cache never left the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from random import Random
from typing import Any

import pytest
import torch
from generating import CPU, PlainEngine, greedy_by_transformers, rows_of, run_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import PACKED_MODELS, VOCABULARY, build_model
from transformers import DynamicCache

from zeroinf.generation.groups import Group
from zeroinf.generation.host_steps import HostSteps
from zeroinf.generation.link import Link, Run, Runs, Unit
from zeroinf.generation.pass_limits import Limits
from zeroinf.generation.range_allocator import RangeAllocator
from zeroinf.generation.records import read, write
from zeroinf.generation.row import Row
from zeroinf.generation.scheduler import Scheduler
from zeroinf.model.cache_layout import FETCHED_UNITS, LONG_RUN_BYTES, KvDtype, Record, TokenState
from zeroinf.model.kv import cache_name

LENGTHS = ((7, 6), (1, 9), (20, 3), (12, 1), (3, 12), (9, 8), (18, 14))
# They come and go, in small micro-batches, prompts in pieces; some find pages, the others rest on the host.
MIXED = {"draw": 2, "rows": 5, "pages": 3, "host_tokens": 80, "micro_batch_rows": 2, "prefill_tokens": 8}
ALL = {**MIXED, "rows": 3, "pages": 0}
PACKED = {**MIXED, "forward_tokens": 9}
ALL_PACKED = {**ALL, "forward_tokens": 5}
BY_CPU = {**PACKED, "cpu_rows": 5}
ALL_BY_CPU = {**ALL_PACKED, "cpu_rows": 3}
IN_TURNS = {**ALL_BY_CPU, "micro_batch_rows": 3, "cpu_forwards": 2}
ROOM = {
    "rows": (5, 8), "pages": (3, 4), "host_tokens": (80, 160), "micro_batch_rows": (1, 4),
    "prefill_tokens": (5, 30), "forward_tokens": (3, 30),
}  # fmt: skip
TOGETHER = {"draw": 2, "rows": 3, "pages": 0, "host_tokens": 120}


def rows() -> list[Row]:
    prompts = [[3 + (7 * row + 11 * at) % (VOCABULARY - 3) for at in range(n)] for row, (n, _) in enumerate(LENGTHS)]
    return rows_of(prompts, [new for _, new in LENGTHS], ignore_eos=True)


def tokens_of(model: Any, limits: dict[str, int], **more: Any) -> list[Row]:
    ran = rows()
    _, scheduler = run_rows(PlainEngine(model), ran, **limits, **more)
    assert scheduler._host.free == limits["host_tokens"], "a row that ended has left something behind"
    return ran


@pytest.mark.parametrize("limits", [ALL, MIXED, ALL_PACKED, PACKED], ids=["all", "mixed", "all packed", "packed"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma2", "mistral", "exaone4", "deepseek_v3"])
def test_tokens_are_those_of_plain_transformers(name: str, limits: dict[str, int]) -> None:
    model = build_model(name)
    if limits.get("forward_tokens") and name not in PACKED_MODELS:
        pytest.skip("it runs padded")
    ran = tokens_of(model, limits)
    assert [row.generated for row in ran] == [greedy_by_transformers(model, row.prompt, row.generated) for row in ran]


WITH_KEYS = [name for name in PACKED_MODELS if name not in ("falcon_mamba", "mamba", "mamba2")]
FIRST = ("llama", "gemma2", "gemma3_text", "gpt_oss", "gpt2", "mixtral", "exaone4", "phi3")
"""Groups of heads, soft caps, windows, sinks, experts, and more."""


@pytest.mark.parametrize("limits", [ALL_BY_CPU, BY_CPU, IN_TURNS], ids=["all", "mixed", "in turns"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FIRST else pytest.mark.full) for name in WITH_KEYS]
)
def test_where_the_cpu_attends_they_are_too(name: str, limits: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    steps = list[int]()

    def submit(self: HostSteps, *given: Any) -> Any:
        steps.append(len(given[2]))
        return submitted(self, *given)

    submitted = HostSteps.submit
    monkeypatch.setattr(HostSteps, "submit", submit)
    model = build_model(name)
    ran = tokens_of(model, limits)
    assert [row.generated for row in ran] == [greedy_by_transformers(model, row.prompt, row.generated) for row in ran]
    assert max(steps) == 2, "micro-batches of steps"


def test_a_pass_that_breaks_before_its_flag_is_raised_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    raised, fill = list[int](), torch.Tensor.fill_

    def breaks(flag: torch.Tensor, value: Any) -> torch.Tensor:
        if flag.dtype == torch.int64 and flag.shape == (1,):
            raised.append(value)
            if len(raised) == 7:
                raise torch.OutOfMemoryError
        return fill(flag, value)

    monkeypatch.setattr(torch.Tensor, "fill_", breaks)
    model, ran = build_model("llama"), rows()
    run_rows(PlainEngine(model), ran, **ALL_BY_CPU)
    assert [row.generated for row in ran] == [greedy_by_transformers(model, row.prompt, row.generated) for row in ran]
    assert raised[7:9] == [7, 8], "once more, for the step that waits"


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        pytest.param(name, seed, marks=[] if name in FIRST and not seed else pytest.mark.full)
        for name, seed in product(WITH_KEYS, range(3))
    ],
)
def test_so_they_are_whatever_rows_come_when(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, draw = build_model(name), Random(f"{name} {seed}")
    prompts = [[draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, 24))] for _ in range(draw.randint(10, 16))]
    ran = rows_of(prompts, [draw.randint(4, 12) for _ in prompts], ignore_eos=True)
    limits, left, passes = {name: draw.randint(*room) for name, room in ROOM.items()}, list(ran), list[set[bool]]()

    def take() -> list[Row] | None:
        if left and draw.random() < 0.25:
            return None
        taken = left[: draw.randint(1, 4)]
        del left[: len(taken)]
        return taken

    def next_pass(self: Scheduler, **given: Any) -> list[Group]:
        groups = next_of(self, **given)
        passes.append({seat.on_host for group in groups for seat in group.seats})
        return groups

    next_of = Scheduler.next_pass
    monkeypatch.setattr(Scheduler, "next_pass", next_pass)
    run_rows(PlainEngine(model), ran, **limits, cpu_rows=limits["rows"], take=take)
    assert [row.generated for row in ran] == [greedy_by_transformers(model, row.prompt, row.generated) for row in ran]
    assert {True, False} in passes, "rows on the GPU and in host memory in one pass"


@pytest.mark.parametrize("name", ["lfm2", "qwen3_next"])
def test_layers_with_other_states_keep_them_on_the_gpu(name: str) -> None:
    model = build_model(name)
    ran = tokens_of(model, TOGETHER)
    assert [row.generated for row in ran] == [greedy_by_transformers(model, row.prompt, row.generated) for row in ran]


class Rounded(DynamicCache):  # type: ignore[misc]
    """What transformers' attention sees if keys and values lose as much as codes of a byte do."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **named: Any) -> Any:
        def rounded(states: torch.Tensor) -> torch.Tensor:
            scales = states.abs().amax(-1, keepdim=True) / 127
            return (states / scales).round() * scales

        return super().update(rounded(keys), rounded(values), *args, **named)


@pytest.mark.parametrize(
    ("name", "limits"),
    [("deepseek_v3", ALL), *product(("llama", "gemma2"), (ALL, ALL_PACKED, ALL_BY_CPU))],
)
def test_codes_of_a_byte_change_tokens_as_rounding_does_and_by_nothing_else(name: str, limits: dict[str, int]) -> None:
    model = build_model(name)
    ran = tokens_of(model, limits, kv_dtype="int8")
    for row in ran:
        cache = Rounded(config=model.config)
        with torch.no_grad():
            logits = model(torch.tensor([[*row.prompt, *row.generated[:-1]]]), **{cache_name(model): cache}).logits
        assert row.generated == logits[0, len(row.prompt) - 1 :].argmax(-1).tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_code_is_off_by_half_its_scale_at_the_most_and_zeros_stay(dtype: str) -> None:
    record = Record(
        keys=TokenState(heads=2, width=12, dtype=dtype), values=TokenState(heads=3, width=8, dtype=dtype), dtype="int8"
    )
    torch.manual_seed(0)
    states = [torch.randn(2, heads, 5, width, dtype=getattr(torch, dtype)) for heads, width in ((2, 12), (3, 8))]
    states[0][0, 0, 0] = 0
    states[0][0, 1, 1] *= 1e4
    held = torch.full((2, 5, record.nbytes), 255, dtype=torch.uint8)
    write(record, held, *states)
    for was, found in zip(states, read(record, held), strict=True):
        assert found.dtype == was.dtype
        half = was.float().abs().amax(-1, keepdim=True) / 254
        assert ((found.float() - was.float()).abs() <= half + was.float().abs() * torch.finfo(was.dtype).eps).all()
    assert not read(record, held)[0][0, 0, 0].any()


@pytest.mark.parametrize("kv_dtype", ["model", "int8"])
@pytest.mark.parametrize("change", [{"dtype": torch.bfloat16}, {"heads": 1}, {"rows": 1}])
def test_states_of_another_kind_are_refused_rather_than_converted(change: dict[str, Any], kv_dtype: KvDtype) -> None:
    state = TokenState(heads=2, width=8, dtype="float32")
    record = Record(keys=state, values=state, dtype=kv_dtype)
    states = torch.zeros(change.get("rows", 2), change.get("heads", 2), 4, 8, dtype=change.get("dtype"))
    with pytest.raises(RuntimeError, match="is not float32"):
        write(record, torch.zeros(2, 4, record.nbytes, dtype=torch.uint8), states, states)


class Breaking(PlainEngine):
    """The pass of number `breaks` runs out of memory in the second block of its last micro-batch."""

    def __init__(self, model: Any, breaks: int) -> None:
        super().__init__(model)
        self._breaks = breaks
        model.model.layers[1].register_forward_pre_hook(self._may_break)

    def _may_break(self, *ignored: Any) -> None:
        if len(self.passes) == self._breaks:
            self._left -= 1
            if not self._left:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def forward(self, micro_batches: Sequence[Any]) -> list[Any]:
        self._left = len(micro_batches)
        return super().forward(micro_batches)


@pytest.mark.parametrize("limits", [ALL, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize("breaks", [1, 4, 7])
def test_a_pass_that_breaks_between_blocks_is_made_again(breaks: int, limits: dict[str, int]) -> None:
    model = build_model("llama")
    ran = rows()
    engine = Breaking(model, breaks)
    run_rows(engine, ran, **{**limits, "prefill_tokens": 40, "draw": 7})
    assert len(engine.passes) > breaks
    engine._breaks = -1
    assert [row.generated for row in ran] == [greedy_by_transformers(model, row.prompt, row.generated) for row in ran]


def test_a_row_that_fits_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match="room for 13 tokens of 12"):
        run_rows(PlainEngine(build_model("llama")), rows()[:1], rows=1, pages=0, host_tokens=12)


def test_rows_of_one_micro_batch_lie_in_one_place() -> None:
    with pytest.raises(ValueError, match="all on the GPU or all in host memory"):
        Limits(rows=2, pages=4, micro_batch_rows=2, prefill_tokens=9, together=True, host_tokens=9)


def units_of(count: int) -> list[Unit]:
    """Each of six records, of which the first holds anything; places of memory hold their own number."""
    memory = torch.arange(1, 21, dtype=torch.uint8).view(-1, 1).expand(-1, 16).contiguous()
    return [Unit(layer, memory, 6, Runs([Run(1, layer, 2), Run(3, layer + 5, 3)])) for layer in range(count)]


def test_units_arrive_ahead_of_their_turn_and_in_order() -> None:
    link, units = Link((FETCHED_UNITS * 2 * 3 * 16, 0), 8, CPU, None), units_of(8)
    for _ in range(2):
        link.begin(units)
        before = link.fetched_bytes
        for turn, unit in enumerate(units):
            found = link.take(unit)[1:, 0]
            assert found.tolist() == [turn + 1, turn + 2, turn + 6, turn + 7, turn + 8]
            ahead = min(turn + FETCHED_UNITS, len(units))
            assert link.fetched_bytes - before == (ahead - FETCHED_UNITS) * 5 * 16
    assert link.fetched_bytes == 2 * len(units) * 5 * 16


def test_one_kernel_copies_many_short_runs_and_copy_engines_the_others() -> None:
    memory = torch.empty(1, 4096, dtype=torch.uint8).expand(100_000, -1)
    short, long = LONG_RUN_BYTES // 4096 - 1, LONG_RUN_BYTES // 4096

    def has_short_runs(rows: int, count: int) -> bool:
        runs = [Run(row * count, row * count, count) for row in range(rows)]
        return Unit(0, memory, rows * count, Runs(runs)).has_short_runs

    assert has_short_runs(32, short)
    assert not has_short_runs(32, long)
    assert not has_short_runs(2, 1)  # two copies take the host no longer than a kernel


def test_units_out_of_order_are_refused_and_a_new_pass_begins_anew() -> None:
    link, units = Link((FETCHED_UNITS * 2 * 3 * 16, 0), 8, CPU, None), units_of(8)
    for taken in (0, 1, 4, 8):
        link.begin(units)
        for unit in units[:taken]:
            link.take(unit)
        with pytest.raises(RuntimeError, match="out of order"):
            link.take(units[taken - 2])
    link.begin(units[3:5])
    assert link.take(units[3])[3:, 0].tolist() == [9, 10, 11]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 60), st.lists(st.tuples(st.booleans(), st.integers(1, 25)), max_size=60))
def test_no_two_rows_share_a_place_and_none_is_lost(size: int, calls: list[tuple[bool, int]]) -> None:
    arena, held = RangeAllocator(size), list[tuple[int, int]]()
    for takes, number in calls:
        if takes:
            start = arena.take(number)
            if start is None:
                taken = {place for at, count in held for place in range(at, at + count)}
                assert not any(taken.isdisjoint(range(at, at + number)) for at in range(size - number + 1))
            else:
                held.append((start, number))
        elif held:
            arena.give_back(*held.pop(number % len(held)))
        places = [place for at, count in held for place in range(at, at + count)]
        assert len(places) == len(set(places))
        assert set(places) <= set(range(size))
        assert arena.free == size - len(places)
    for each in held:
        arena.give_back(*each)
    assert arena.take(size) == (0 if size else None)
