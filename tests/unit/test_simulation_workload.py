"""Micro-batches on paper against the same ones really run, and against themselves with every block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from small_models import SMALL_MODELS, small_config
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from zeroinf.generation.cache import CachePool
from zeroinf.generation.micro_batch import MicroBatch, TokenRules
from zeroinf.generation.row import Row, Sampling
from zeroinf.model.anatomy import Anatomy
from zeroinf.model.inspect import read_anatomy
from zeroinf.planner.allocator import Allocator, Event, Usage
from zeroinf.planner.workload import Step, Workload, repeated
from zeroinf.simulation.workload import Simulator

CPU = torch.device("cpu")
ROWS, PROMPT, NEW = 4, 40, 9
# On the CPU constants that code writes into tensors are tensors themselves, of 4 bytes each.
SCALARS_BYTES = 128


@cache
def anatomy_of(name: str) -> Anatomy:
    return read_anatomy(small_config(name))


POOLED = sorted(name for name in SMALL_MODELS if all(layer.pooled for layer in anatomy_of(name).cache))

# Their blocks change kind every fourth or sixth time.
LAYERS = {"cohere2": 28, "smollm3": 28, "gemma3_text": 40}


def eager(name: str) -> Any:
    """The small model's config with attention written out in torch, which is the same on every device."""
    config = small_config(name)
    config._attn_implementation = "eager"
    return config


def simulator(config: Any, anatomy: Anatomy, *, prompt: int = PROMPT, new: int = NEW, padded: bool = True) -> Simulator:
    return Simulator(config, anatomy, prompt_tokens=prompt, new_tokens=new, padded=padded)


def peaks(phases: Iterable[Iterable[int]]) -> list[tuple[int, int]]:
    """Of each phase, given as bytes allocated and (negative) freed: the most that was alive in it, and what is left."""
    found, live = [], 0
    for phase in phases:
        peak = live
        for change in phase:
            live += change
            peak = max(peak, live)
        found.append((peak, live))
    return found


def changes(events: Iterable[Event], sizes: dict[int, int]) -> Iterator[int]:
    for event in events:
        if event.nbytes is None:
            yield -sizes[event.key]
        else:
            sizes[event.key] = event.nbytes
            yield event.nbytes


def simulated(workload: Workload) -> list[tuple[int, int]]:
    sizes: dict[int, int] = {}
    steps = (workload.prefill, workload.first_decode)
    return peaks(changes(events, sizes) for events in (workload.cache, *(step.events for step in steps)))


def measured(act: Callable[[], Any]) -> tuple[Any, list[int]]:
    """What `act` returns, and every allocation and free of the CPU's allocator meanwhile."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = act()
    assert seen.profiler is not None
    events = seen.profiler.kineto_results.events()
    return result, [event.nbytes() for event in events if event.name() == "[memory]"]


def step(model: Any, batch: MicroBatch) -> None:
    output = model(**batch.inputs())
    batch.choose(output)
    del output
    batch.accept(lambda row: None)


def rows_of(count: int) -> list[Row]:
    """Rows of which the first is longest, as the simulation takes them."""
    sampling = Sampling(max_new_tokens=NEW, ignore_eos=True)
    return [
        Row(index=i, prompt=[5] * (1 if i else PROMPT), sampling=sampling, decode=lambda ids: "") for i in range(count)
    ]


@pytest.mark.parametrize("name", sorted(SMALL_MODELS))
def test_bytes_alive_in_every_phase_are_those_of_a_real_run(name: str) -> None:
    model = AutoModelForCausalLM.from_config(eager(name), dtype=torch.float32).eval()
    batches: list[MicroBatch] = []

    def prefill(pool: CachePool) -> None:
        batches.append(MicroBatch(model, rows_of(ROWS), TokenRules(model, None, ()), pool, CPU))
        step(model, batches[0])

    with torch.no_grad():
        pool, making = measured(lambda: CachePool(model, anatomy_of(name), rows=ROWS, tokens=PROMPT + NEW, device=CPU))
        _, first = measured(lambda: prefill(pool))
        _, second = measured(lambda: step(model, batches[0]))
    real = peaks((making, first, second))
    paper = simulated(simulator(eager(name), anatomy_of(name))(ROWS))
    for phase, seen, said in zip(("pool", "prefill", "first decode"), real, paper, strict=True):
        assert said == pytest.approx(seen, abs=SCALARS_BYTES), phase


def deeper(name: str) -> Any:
    """The small model's config with more layers of each kind than are run."""
    config = small_config(name)
    layers = LAYERS.get(name, 16)
    fields = config.to_dict()
    for computed in ("layer_types", "mlp_layer_types", "attention_layers", "no_rope_layers"):
        fields.pop(computed, None)
    if "attention_types" in fields:
        fields["attention_types"] = [[["global", "local"], layers // 2]]
    fields[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = layers
    return type(config)(**fields)


def usage(workload: Workload) -> Usage:
    allocator = Allocator()
    allocator.replay(workload.cache)
    allocator.replay(repeated(workload.steps))
    return allocator.usage


def totals(of: Step) -> list[float]:
    """Number, operations and bytes of all kernels."""
    return [
        sum(group.times * amount(kernel) for group in of.kernels for kernel in group.kernels)
        for amount in (lambda kernel: 1, lambda kernel: kernel.flops, lambda kernel: kernel.nbytes)
    ]


@pytest.mark.parametrize("name", POOLED)
def test_blocks_left_out_change_neither_the_peak_nor_what_is_computed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = deeper(name)
    anatomy = read_anatomy(config)
    few = simulator(config, anatomy)
    monkeypatch.setattr(Simulator, "_keep_kinds", lambda self: None)
    every = simulator(config, anatomy)
    assert len(few._blocks) < len(every._blocks) == len(anatomy.blocks)
    some, all_of_them = few(3), every(3)
    assert usage(some) == usage(all_of_them)
    for mine, theirs in zip(some.steps, all_of_them.steps, strict=True):
        assert totals(mine) == pytest.approx(totals(theirs), rel=1e-9)


def test_kinds_that_differ_in_decode_only_are_told_apart() -> None:
    config = deeper("gemma3_text")
    config.sliding_window = PROMPT + 4  # full in the middle of the generation
    workload = simulator(config, read_anatomy(config))(2)
    blocks = [group.kernels for group in workload.last_decode.kernels[1:]]
    assert workload.prefill.kernels[1].kernels == workload.prefill.kernels[-1].kernels
    assert blocks[0] != blocks[5]


@pytest.mark.parametrize("name", ["llama", "bloom", "gemma2", "mixtral", "deepseek_v3", "mamba", "jamba"])
def test_more_rows_longer_prompts_and_more_tokens_never_need_less(name: str) -> None:
    def needs(rows: int, prompt: int, new: int) -> list[float]:
        workload = simulator(small_config(name), anatomy_of(name), prompt=prompt, new=new)(rows)
        return [usage(workload).allocated, *(total for of in workload.steps for total in totals(of)[1:])]

    least = needs(2, 20, 4)
    for more in ((3, 20, 4), (2, 33, 4), (2, 20, 17)):
        assert all(one <= other for one, other in zip(least, needs(*more), strict=True)), more
    assert least[0] < needs(4, 40, 4)[0]


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "bloom", "jamba"])
@pytest.mark.parametrize(("rows", "prompt", "new"), [(1, 5, 1), (3, 40, 9), (5, 17, 100)])
def test_the_cache_is_the_one_that_a_run_allocates(name: str, rows: int, prompt: int, new: int) -> None:
    anatomy = anatomy_of(name)
    workload = simulator(small_config(name), anatomy, prompt=prompt, new=new)(rows)
    model = AutoModelForCausalLM.from_config(small_config(name))
    pool = CachePool(model, anatomy, rows=rows, tokens=prompt + new, device=CPU)
    assert [event.nbytes for event in workload.cache] == [pool.nbytes]


@pytest.mark.parametrize("new", [1, 2, 3])
def test_a_short_generation_has_fewer_steps_and_can_be_planned(new: int) -> None:
    workload = simulator(small_config("llama"), anatomy_of("llama"), new=new)(2)
    assert len(workload.steps) == new
    assert usage(workload).allocated > sum(event.nbytes or 0 for event in workload.cache)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss", "mamba"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_dtype_can_be_planned(name: str, dtype: str) -> None:
    anatomy = read_anatomy(small_config(name), dtype=dtype)
    workload = simulator(small_config(name), anatomy)(2)
    assert totals(workload.prefill)[1] > totals(workload.first_decode)[1] > 0
    assert anatomy.dtype == dtype


def test_experts_compute_what_their_shapes_say() -> None:
    config = small_config("mixtral")
    dense = replace_experts(config)
    tokens = 2 * PROMPT
    own, more = (totals(simulator(each, read_anatomy(each), padded=False)(2).prefill)[1] for each in (config, dense))
    # Two experts a token instead of one: three products of hidden by intermediate size each, in every layer.
    assert own - more == 2 * tokens * 3 * config.hidden_size * config.intermediate_size * config.num_hidden_layers


def replace_experts(config: Any) -> Any:
    """The same with one expert a token."""
    return type(config)(**{**config.to_dict(), "num_experts_per_tok": 1})


def test_the_same_rows_are_simulated_once() -> None:
    simulate = simulator(small_config("llama"), anatomy_of("llama"))
    assert simulate(3) is simulate(3)
    assert simulate(3) == replace(simulate(3), rows=3)
