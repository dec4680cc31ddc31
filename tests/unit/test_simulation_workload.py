"""Micro-batches on paper against the same ones really run, and against themselves with every block."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from generating import PlainEngine, rows_of
from quantized import MARKS
from recorded import repeated
from small_models import PACKED_MODELS, REPRESENTATIVES, SMALL_MODELS, small_config
from tiers import tiered
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from zeroinf.generation.attention import MOST_PARTS, parts_elements
from zeroinf.generation.cache import PagePool
from zeroinf.generation.groups import Group
from zeroinf.generation.host_cache import HostCache
from zeroinf.generation.loop import Feed, _Passes
from zeroinf.generation.micro_batch import BatchState, TokenRules
from zeroinf.generation.pass_limits import Limits
from zeroinf.generation.row import Row, Sampling
from zeroinf.generation.scheduler import Scheduler
from zeroinf.generation.seats import Seat
from zeroinf.generation.states import _TOKENS_AT_ONCE, CallLimits
from zeroinf.model.anatomy import Anatomy
from zeroinf.model.cache_layout import KvDtype
from zeroinf.model.inspect import build_meta, find_blocks, read_anatomy
from zeroinf.model.quantized.expansion import expansions
from zeroinf.planner.allocator import Allocator, Event, Usage
from zeroinf.planner.workload import Lengths, Pass, Shape, Step, Workload, lock_step
from zeroinf.simulation.workload import Simulator
from zeroinf.structured.answer_format import AnswerFormat

CPU = torch.device("cpu")
ROWS, PROMPT, NEW = 4, 40, 9
# On the CPU constants that code writes into tensors are tensors themselves, of 4 bytes each.
SCALARS_BYTES = 128


@cache
def anatomy_of(name: str) -> Anatomy:
    return read_anatomy(small_config(name))


# Their caches hold states, which no pages serve.
RECURRENT = ("bamba", "falcon_mamba", "jamba", "lfm2", "mamba", "mamba2", "qwen3_next")
POOLED = [name for name in sorted(SMALL_MODELS) if name not in RECURRENT]

USUAL = [name for name in POOLED if name in REPRESENTATIVES]

# Their blocks change kind every second, fourth or sixth time.
LAYERS = {"exaone4": 16, "gemma2": 16, "gpt_oss": 16, "cohere2": 28, "smollm3": 28, "gemma3_text": 40}


def eager(name: str) -> Any:
    """The small model's config with attention written out in torch, which is the same on every device."""
    config = small_config(name)
    config._attn_implementation = "eager"
    return config


def lengths_of(prompt: int = PROMPT, new: int = NEW, *, padded: bool = True) -> Lengths:
    return Lengths(prompt_tokens=prompt, new_tokens=new, padded=padded)


def simulator(config: Any, anatomy: Anatomy, lengths: Lengths | None = None) -> Simulator:
    return Simulator(config, anatomy, lengths or lengths_of())


def whole(rows: int, micro_batch_rows: int | None = None, prefill_tokens: int = 1 << 20) -> Shape:
    """All prompts in one pass, all rows in one micro-batch, where nothing else is said."""
    return Shape(rows, micro_batch_rows or rows, prefill_tokens)


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


def simulated(workload: Workload, passes: Sequence[Pass]) -> list[tuple[int, int]]:
    sizes: dict[int, int] = {}
    return peaks(changes(events, sizes) for events in (workload.cache, *map(lock_step, passes)))


def measured(act: Callable[[], Any]) -> tuple[Any, list[int]]:
    """What `act` returns, and every allocation and free of the CPU's allocator meanwhile."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = act()
    assert seen.profiler is not None
    events = seen.profiler.kineto_results.events()
    return result, [event.nbytes() for event in events if event.name() == "[memory]"]


# Rows and micro-batches, prompts of how many tokens, in passes of how many: one micro-batch, several, parts of prompts.
CASES = {"one": (ROWS, ROWS, 1 << 20), "several": (4, 2, 1 << 20), "in parts": (3, 1, 16)}


def groups_of(shape: Shape, start: int, count: int, prompts: bool, padded: bool = True, **sampling: Any) -> list[Group]:
    """Micro-batches as the simulation takes them: the first row is longest, `padded` ones are one token shorter."""
    rows = 1 if prompts and count < PROMPT else shape.rows
    groups = []
    for at in range(0, rows, shape.micro_batch_rows):
        seats = []
        for number in range(at, min(rows, at + shape.micro_batch_rows)):
            behind = padded and number > at
            how = Sampling(**{"max_new_tokens": NEW, "ignore_eos": True, **sampling})
            row = Row(index=number, prompt=[5] * (PROMPT - behind), sampling=how, decode=str)
            seat = Seat(row, number, start + count - behind)
            seat.computed = start - (behind and count == 1)
            seats.append(seat)
        groups.append(Group.of(seats))
    return groups


class Run:
    """Passes of a small model, really made on the CPU by the loop's own hands."""

    def __init__(self, model: Any, anatomy: Anatomy, workload: Workload) -> None:
        self.engine, self.shape = PlainEngine(model), workload.shape
        self.workload, self.anatomy = workload, anatomy

    def open(self) -> None:
        pool = PagePool(self.engine.model, self.anatomy, self.workload.pool, CPU)
        self.batch_state = BatchState(self.engine.model, TokenRules(self.engine.model, None, ()), pool, CPU)

    def open_host(self) -> None:
        """Room in host memory, and staging, which plans count by themselves."""
        if self.workload.host is not None:
            self.batch_state.host = HostCache(self.engine.model, self.anatomy, self.workload.host, CPU, None, pin=False)

    def make(self, groups: Sequence[Group]) -> None:
        limits = Limits(rows=self.shape.rows, pages=10**6, micro_batch_rows=self.shape.rows, prefill_tokens=10**6)
        scheduler = Scheduler(limits, self.anatomy.row_pages)
        feed = Feed(take=list, done=lambda row: None)
        passes = _Passes(self.engine, self.batch_state, scheduler, feed)
        assert passes._has_room(groups, ())
        passes.run(groups, ())
        self.engine.asked.clear()


# Passes are put together the same way for every model.
PUT_TOGETHER = ("llama", "gemma2", "bloom", "mixtral", "gpt_oss", "deepseek_v3")
RUNS = [(name, "one") for name in POOLED]
RUNS += [(name, case) for name in PUT_TOGETHER for case in ("several", "in parts")]
USUAL_RUNS = [*((name, "one") for name in USUAL), ("gemma2", "several"), ("gpt_oss", "in parts"), ("llama", "in parts")]


@pytest.mark.parametrize("name", tiered(sorted(SMALL_MODELS), REPRESENTATIVES))
def test_pages_serve_all_caches_but_those_of_recurrent_models(name: str) -> None:
    assert all(layer.pooled for layer in anatomy_of(name).cache) == (name in POOLED)


@pytest.mark.parametrize(("name", "case"), tiered(RUNS, USUAL_RUNS))
def test_bytes_alive_in_every_pass_are_those_of_a_real_run(name: str, case: str) -> None:
    _compare(name, Shape(*CASES[case]))


@pytest.mark.parametrize("name", tiered(RECURRENT, ("lfm2", "qwen3_next")))
def test_so_are_those_of_recurrent_layers_with_prompts_of_one_length(name: str) -> None:
    """Of others fewer meet in a call than plans take for it. Where a module computes chunks that are shorter than a
    prompt, plans hold the output of another call beside the largest one."""
    mixers = anatomy_of(name).mixers
    has_more_calls = mixers is not None and mixers.chunk_tokens < PROMPT
    rel = 0.03 if has_more_calls else 0.003  # the CPU has the rows' seats elsewhere
    for case in CASES.values() if anatomy_of(name).whole_because == "" else (CASES["one"],):
        _compare(name, Shape(*case), {"padded": False}, rel=rel)


@pytest.mark.parametrize("kv_dtype", ["model", "int8"])
@pytest.mark.parametrize("host_rows", [2, 4])
@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v3"])
def test_so_are_those_of_rows_in_host_memory(name: str, host_rows: int, kv_dtype: KvDtype) -> None:
    _compare(name, Shape(4, 2, 1 << 20, host_rows, kv_dtype))
    if host_rows == 4:
        _compare(name, Shape(3, 1, 16, 3, kv_dtype))


@pytest.mark.parametrize("logprobs", [0, 20])
def test_so_are_those_of_rows_that_ask_for_logprobs(logprobs: int) -> None:
    _compare("llama", Shape(*CASES["several"]), {"logprobs": logprobs}, {"logprobs": logprobs})


SAMPLED = {"temperature": 0.7, "top_k": 9, "top_p": 0.5, "min_p": 0.2}
STRUCTURED = {"answer_format": AnswerFormat("regex", "."), "ignore_eos": False}
PENALIZED = {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2}


@pytest.mark.parametrize(
    ("asked", "sampling"),
    [
        ({"sampled": True}, SAMPLED),
        ({"penalized": True}, PENALIZED),
        ({"sampled": True, "penalized": True}, SAMPLED | PENALIZED),
        ({"structured": True}, STRUCTURED),
        ({"sampled": True, "structured": True}, SAMPLED | STRUCTURED),
    ],
)
def test_so_are_those_of_rows_that_are_sampled_or_penalized_or_have_a_format(
    asked: dict[str, bool], sampling: dict[str, Any]
) -> None:
    config = eager("llama")
    config.vocab_size = 30_000  # scores are the largest of all then
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    _compare_model(config, model, Shape(*CASES["several"]), asked, sampling, rel=0.005)


USUAL_EXPANDED = [("llama", "w4a16"), ("llama", "fp8"), ("gpt_oss", "mxfp4")]
EXPANDED = [*(("llama", method) for method in MARKS), ("gpt_oss", "mxfp4")]


@pytest.mark.parametrize(("name", "method"), tiered(EXPANDED, USUAL_EXPANDED))
def test_so_are_those_of_weights_that_modules_expand(name: str, method: str) -> None:
    if method not in ("fp8", "mxfp4"):
        pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    config = eager(name)
    config.quantization_config = (MARKS | {"mxfp4": {"quant_method": "mxfp4"}})[method]
    model = build_meta(config, "float32").to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.copy_(torch.randn(tensor.shape) * 0.1 if tensor.is_floating_point() else torch.tensor(120))
    stack = find_blocks(model)[1]
    gc.collect()  # not while it is measured
    workload = simulator(config, read_anatomy(config))(whole(2))
    assert workload.expansion is not None
    assert any(group.kernels for group in workload.expansion.kernels)
    for block in stack:
        for one in expansions(block):
            one.open()
    # By one kernel on a GPU, by many on the CPU, which take more.
    taken = max(sum(p.nbytes for p in block.parameters() if type(p) is torch.Tensor) for block in stack)
    assert workload.expansion.nbytes == pytest.approx(taken, rel=0.02)
    _compare_model(config, model, Shape(*CASES["several"]))  # every block is expanded for all micro-batches of a pass


def _compare(name: str, shape: Shape, *asked: dict[str, Any], rel: float = 0.0) -> None:
    config = eager(name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    _compare_model(config, model, shape, *asked, rel=rel)


def _compare_model(
    config: Any,
    model: Any,
    shape: Shape,
    lengths: dict[str, Any] | None = None,
    sampling: dict[str, Any] | None = None,
    *,
    rel: float = 0.0,
) -> None:
    anatomy = read_anatomy(config)
    workload = simulator(config, anatomy, replace(lengths_of(), **(lengths or {})))(shape)
    part = min(PROMPT, shape.prefill_tokens)
    padded = (lengths or {}).get("padded", True)
    prompts = groups_of(shape, PROMPT - part, part, True, padded, **(sampling or {}))
    decode = groups_of(shape, PROMPT, 1, False, padded, **(sampling or {}))
    run = Run(model, anatomy, workload)
    _, making = measured(run.open)
    run.open_host()
    on_host = 0 if workload.host is None else workload.host.tokens // shape.host_rows
    for seat in (seat for group in (*prompts, *decode) for seat in group.seats):
        # The longest prompts are those of rows in host memory, whichever these are.
        in_decode = any(seat in group.seats for group in decode)
        if seat.number >= (shape.rows - shape.host_rows if in_decode else 0) and on_host:
            seat.host_start = max(0, seat.number - (shape.rows - shape.host_rows)) * on_host
    run.batch_state.pool.open(dict.fromkeys(range(shape.rows - shape.host_rows), PROMPT + NEW))
    real = [making, *(measured(lambda groups=groups: run.make(groups))[1] for groups in (prompts, decode))]
    real.append(measured(lambda: run.make([*prompts, *decode]))[1])
    paper = simulated(workload, (workload.prompts, workload.first_decode, (*workload.prompts, *workload.first_decode)))
    for phase, seen, said in zip(("pool", "prompts", "decode", "both"), peaks(real), paper, strict=True):
        assert said == pytest.approx(seen, rel=rel, abs=len(prompts + decode) * SCALARS_BYTES), phase


class AsOnAGpu:
    """Writes into pages and allocates what a GPU's kernel does."""

    def __call__(self, layer: Any, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: Any) -> Any:
        out = query.new_zeros(query.shape[1], query.shape[0], values.shape[2])
        query.new_empty(parts_elements(query, keys, values, MOST_PARTS))
        layer.write(keys, values)
        return out


PLACES: tuple[KvDtype | None, ...] = (None, "model", "int8")
"""Keys and values lie on the GPU, or in host memory in one of two ways."""
IN_PLACES = [(name, None) for name in PACKED_MODELS if name not in RECURRENT] + [
    (name, kv) for name in ("llama", "gemma2") for kv in PLACES[1:]
]


@pytest.mark.parametrize(("name", "kv"), tiered(IN_PLACES, [each for each in IN_PLACES if each[0] in REPRESENTATIVES]))
def test_bytes_alive_in_a_packed_forward_follow_from_its_tokens_and_choices(name: str, kv: KvDtype | None) -> None:
    config = eager(name)
    model, anatomy = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), anatomy_of(name)
    shape = Shape(4, 4, 100, 4 if kv else 0, kv or "model", forward_tokens=104)
    simulate = simulator(config, anatomy)
    workload = simulate(shape)
    run = Run(model, anatomy, workload)
    run.open()
    run.open_host()
    run.batch_state.kernel = AsOnAGpu()
    for counts, choices in (([1, 1, 1, 1], 4), ([1, 1, 37], 3), ([1, 30, 7], 2)):
        rows = [Row(index=i, prompt=[5] * 40, sampling=Sampling(max_new_tokens=9), decode=str) for i in range(4)]
        seats = [Seat(rows[at], at, 1 + count + (at >= choices)) for at, count in enumerate(counts)]
        for seat in seats:
            seat.computed, seat.host_start = 1, 60 * seat.number if kv else None
        paged = () if kv else range(len(seats))
        run.batch_state.pool.open(dict.fromkeys(paged, PROMPT + NEW))
        group = Group.packed(seats, [1] * len(seats), counts)
        _, real = measured(lambda group=group: run.make([group]))
        run.batch_state.pool.close(paged)
        step = simulate._forwards(kv).step(sum(counts), choices)
        paper = peaks([changes(lock_step((step,)), {})])
        spared = 80 * len(counts) if max(counts) == 1 else 0  # a token of each row: figures of rows are those of tokens
        assert (paper[0][0] - spared, paper[0][1]) == pytest.approx(peaks([real])[0], abs=2 * SCALARS_BYTES)
    assert max(len(each) for each in workload.passes) == 1


@pytest.mark.parametrize("name", tiered(sorted(RECURRENT), ("lfm2", "qwen3_next")))
def test_packed_forwards_with_recurrent_layers_take_no_more_than_those_with_their_largest_calls(name: str) -> None:
    config, longest = eager(name), 80
    model, anatomy = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), anatomy_of(name)
    rows = 3 + _TOKENS_AT_ONCE // 16
    simulate = simulator(config, anatomy, lengths_of(longest, NEW))
    workload = simulate(Shape(rows, rows, 4 * longest, forward_tokens=rows + 4 * longest))
    run = Run(model, anatomy, workload)
    run.open()
    run.batch_state.kernel = AsOnAGpu()
    limits = CallLimits.of(anatomy, rows)
    largest = [[1] * 3 + [tokens] * limits.rows_of(tokens) for tokens in (longest, min(longest, limits.chunk_tokens))]
    reached = []
    for counts in (*largest, [1, 30, 7], [1, 1, 37]):
        made = rows_of([[5] * 300] * len(counts), NEW)
        seats = [Seat(row, at, 1 + count) for at, (row, count) in enumerate(zip(made, counts, strict=True))]
        starts = [0 if anatomy.whole_because and count > 1 else 1 for count in counts]
        for seat, start in zip(seats, starts, strict=True):
            seat.computed, seat.known = start, start + seat.known - 1
        run.batch_state.pool.open(dict.fromkeys(range(len(seats)), longest + NEW))
        group = Group.packed(seats, starts, counts)
        _, real = measured(lambda group=group: run.make([group]))
        run.batch_state.pool.close(range(len(seats)))
        step = simulate._forwards(None).step(sum(counts), len(counts))
        ((paper, _),), ((peak, _),) = peaks([changes(lock_step((step,)), {})]), peaks([real])
        assert paper >= peak - 2 * SCALARS_BYTES - 80 * len(counts), counts
        reached.append(peak / paper)
    assert max(reached) > 0.9


def deeper(name: str) -> Any:
    """The small model's config with more layers of each kind than are run."""
    config = small_config(name)
    layers = LAYERS.get(name, 8)
    fields = config.to_dict()
    for computed in ("layer_types", "mlp_layer_types", "attention_layers", "no_rope_layers"):
        fields.pop(computed, None)
    if "attention_types" in fields:
        fields["attention_types"] = [[["global", "local"], layers // 2]]
    fields[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = layers
    return type(config)(**fields)


def steps_of(workload: Workload) -> tuple[Step, ...]:
    return (*workload.prompts, *workload.first_decode, *workload.last_decode)


def usage(workload: Workload) -> Usage:
    allocator = Allocator()
    allocator.replay(workload.cache)
    allocator.replay(repeated(workload.passes))
    return allocator.usage


def totals(of: Step) -> list[float]:
    """Number, operations and bytes of all kernels."""
    return [
        sum(group.times * amount(kernel) for group in of.kernels for kernel in group.kernels)
        for amount in (lambda kernel: 1, lambda kernel: kernel.flops, lambda kernel: kernel.nbytes)
    ]


@pytest.mark.parametrize("name", tiered(POOLED, USUAL))
def test_blocks_left_out_change_neither_the_peak_nor_what_is_computed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = deeper(name)
    anatomy = read_anatomy(config)
    few = simulator(config, anatomy)
    monkeypatch.setattr(Simulator, "_keep_kinds", lambda self, kinds: None)
    every = simulator(config, anatomy)
    assert len(few._blocks) < len(every._blocks) == len(anatomy.blocks)
    some, all_of_them = few(whole(3)), every(whole(3))
    assert usage(some) == usage(all_of_them)
    for mine, theirs in zip(steps_of(some), steps_of(all_of_them), strict=True):
        assert totals(mine) == pytest.approx(totals(theirs), rel=1e-9)


def test_kinds_that_differ_in_decode_only_are_told_apart() -> None:
    config = deeper("gemma3_text")
    config.sliding_window = PROMPT + 4  # full in the middle of the generation
    workload = simulator(config, read_anatomy(config))(whole(2))
    sliding, full = workload.last_decode[0].kernels[1:]
    assert sliding.kernels != full.kernels
    assert [sliding.times, full.times] == [
        config.layer_types.count(f"{kind}_attention") for kind in ("sliding", "full")
    ]
    assert [group.times for group in workload.prompts[0].kernels[1:]] == [len(config.layer_types)]


GROWING = ("llama", "bloom", "gemma2", "mixtral", "deepseek_v3", "mamba", "jamba")


@pytest.mark.parametrize("name", tiered(GROWING, ("llama", "mixtral", "mamba")))
def test_more_rows_longer_prompts_and_more_tokens_never_need_less(name: str) -> None:
    def needs(rows: int, prompt: int, new: int) -> list[float]:
        workload = simulator(small_config(name), anatomy_of(name), lengths_of(prompt, new))(whole(rows))
        return [usage(workload).allocated, *(total for of in steps_of(workload) for total in totals(of)[1:])]

    least = needs(2, 20, 4)
    for more in ((3, 20, 4), (2, 33, 4), (2, 20, 17)):
        assert all(one <= other for one, other in zip(least, needs(*more), strict=True)), more
    assert least[0] < needs(4, 40, 4)[0]


@pytest.mark.parametrize("mean_pages", [None, 1.5])
@pytest.mark.parametrize("name", ["llama", "mistral", "jamba", "mamba"])
def test_the_pool_is_the_one_that_a_run_allocates(name: str, mean_pages: float | None) -> None:
    anatomy = anatomy_of(name)
    lengths = replace(lengths_of(), mean_pages=mean_pages)
    workload = simulator(small_config(name), anatomy, lengths)(whole(5))
    assert workload.pool == lengths.pool(anatomy, 5)
    assert workload.pool.pages >= anatomy.row_pages(PROMPT + NEW)
    pool = PagePool(AutoModelForCausalLM.from_config(small_config(name)), anatomy, workload.pool, CPU)
    assert pool.nbytes == max(event.nbytes or 0 for event in workload.cache) or name == "mamba"


def test_shorter_prompts_than_the_longest_take_fewer_passes_and_lighter_steps() -> None:
    config, shape, alike = small_config("llama"), whole(8, 4, 2 * PROMPT), lengths_of()
    even = simulator(config, anatomy_of("llama"), alike)(shape)
    mixed = simulator(config, anatomy_of("llama"), replace(alike, mean_prompt_tokens=PROMPT / 2))(shape)
    assert (even.prompts_rows, mixed.prompts_rows) == (2, 4)
    assert totals(mixed.first_decode[0])[1] < totals(even.first_decode[0])[1]
    single = simulator(config, anatomy_of("llama"), replace(alike, mean_prompt_tokens=PROMPT / 2))(whole(8, 1))
    assert single.decode_at < even.decode_at == 0.5
    assert usage(mixed) == usage(even)


@pytest.mark.parametrize("new", [1, 2, 3])
def test_a_short_generation_has_fewer_steps_and_can_be_planned(new: int) -> None:
    workload = simulator(small_config("llama"), anatomy_of("llama"), lengths_of(new=new))(whole(2))
    assert len(steps_of(workload)) == (1 if new == 1 else 3)
    assert usage(workload).allocated > sum(event.nbytes or 0 for event in workload.cache)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss", "mamba"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_dtype_can_be_planned(name: str, dtype: str) -> None:
    anatomy = read_anatomy(small_config(name), dtype=dtype)
    workload = simulator(small_config(name), anatomy)(whole(2))
    assert totals(workload.prompts[0])[1] > totals(workload.first_decode[0])[1] > 0
    assert anatomy.dtype == dtype


def test_experts_compute_what_their_shapes_say() -> None:
    config = small_config("mixtral")
    dense = replace_experts(config)
    tokens = 2 * PROMPT
    own, more = (
        totals(simulator(each, read_anatomy(each), lengths_of(padded=False))(whole(2)).prompts[0])[1]
        for each in (config, dense)
    )
    # Two experts a token instead of one: three products of hidden by intermediate size each, in every layer.
    assert own - more == 2 * tokens * 3 * config.hidden_size * config.intermediate_size * config.num_hidden_layers


def replace_experts(config: Any) -> Any:
    """The same with one expert a token."""
    return type(config)(**{**config.to_dict(), "num_experts_per_tok": 1})


def test_the_same_rows_are_simulated_once() -> None:
    simulate = simulator(small_config("llama"), anatomy_of("llama"))
    assert simulate(whole(3)) is simulate(whole(3))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_experts_by_kernels_launch_less_and_hold_less(name: str) -> None:
    config = eager(name)
    anatomy = read_anatomy(config, dtype="bfloat16")
    shape, found = Shape(8, 8, 64, forward_tokens=64), []
    for own_kernels in (True, False):
        simulate = Simulator(config, anatomy, lengths_of(), own_kernels=own_kernels)
        packed = simulate(shape).packed
        assert packed is not None
        kernels = [kernel for group in packed.forwards.tokens[6][1] for kernel in group.kernels]
        allocated = sum(event.nbytes or 0 for step in packed.fullest[0] for part in step.sections for event in part)
        found.append((len(kernels), allocated, sum(kernel.flops for kernel in kernels)))
    (own, theirs) = found
    assert own[0] < theirs[0]
    assert own[1] < theirs[1]
    assert own[2] == theirs[2]


@pytest.mark.parametrize(("name", "parts"), [("gpt_oss", 1), ("gpt_oss", 2), ("qwen3_moe", 1)])
def test_experts_that_are_multiplied_as_codes_are_not_expanded(name: str, parts: int) -> None:
    config = eager(name)
    config.quantization_config = (
        {"quant_method": "mxfp4"}
        if name == "gpt_oss"
        else {"quant_method": "awq", "bits": 4, "group_size": 32, "modules_to_not_convert": ["self_attn"]}
    )
    anatomy = read_anatomy(config, dtype="bfloat16")
    simulate = Simulator(config, anatomy, lengths_of(), own_kernels=True)
    workload = simulate(Shape(8, 8, 64, forward_tokens=64, expert_parts=parts))
    assert workload.expansion is not None and workload.packed is not None
    assert workload.expansion.nbytes == 0 and not any(group.kernels for group in workload.expansion.kernels)
    found = [kernel for group in workload.packed.forwards.tokens[6][1] for kernel in group.kernels]
    operator = f"multiply_{'mxfp4' if name == 'gpt_oss' else 'integers'}_by_experts"
    codes = [kernel for kernel in found if kernel.operator == operator]
    assert codes and all(kernel.flops for kernel in codes)
