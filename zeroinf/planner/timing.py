"""Predicts the duration of a plan: a roofline over links, disk, arithmetic, GPU memory and kernel launches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import ceil, hypot, inf
from operator import mul
from typing import Literal, NamedTuple

from zeroinf.model.anatomy import Anatomy
from zeroinf.model.cache_layout import LONG_RUN_BYTES
from zeroinf.planner.choice import Choice
from zeroinf.planner.coded_products import CodedLayers, at_once, coded_layers, in_parts, on_codes, with_many_rows
from zeroinf.planner.descriptor import descriptor_of
from zeroinf.planner.figures import FittedFigures
from zeroinf.planner.graphs import FLAT_TOKENS, SERVED_TIMES, graph_size, graph_sizes, launched_share
from zeroinf.planner.kernel_times import kernel_s
from zeroinf.planner.kv import fetched_bytes, row_bytes
from zeroinf.planner.memory import pieces, table_pieces, with_layers
from zeroinf.planner.routing import expert_bytes, routed_share
from zeroinf.planner.walks import Walk, walks
from zeroinf.planner.workload import Forwards, Kernel, Kernels, Pass, Shape, Step, Workload

Resource = Literal[
    "link", "disk", "all-gather", "arithmetic", "GPU memory", "kernel launches", "host memory", "disk rows"
]

# How many lifetimes of rows are walked through, in how many strides each, and what is left of a row by rounding.
_WAVES = 4
_STRIDES = 64
_FEW = 1e-6
# The same of rows of different lengths, and in how many strides the longest of them lives.
_MIXED_WAVES = 2
_MIXED_STRIDES = 32
# Rows enter in so many groups at least in the time of a row, and in smaller ones where that takes as good as no longer.
_FEWEST_GROUPS = 4
_NEXT_TO_NOTHING = 1.005
# Kernels' launches that the host spends on a gather beside its bytes: numbers come from the GPU, rows go there.
_GATHER_LAUNCHES = 8
_PAGE_BYTES = 4096
# Kernels' launches that it takes the host to learn which experts a layer's tokens are routed to, and to copy these.
_ASKING_LAUNCHES = 10
_NEXT_TRIED = 1.2  # the cost is flat around the best number: those between are not worth their time


@dataclass(frozen=True, kw_only=True, slots=True)
class Speeds:
    """The rates of one rank that a plan is timed with: GB/s (10^9 bytes), 10^12 operations/s, seconds."""

    link_gbps: float
    disk_gbps: float
    disk_reads_per_s: float
    """Reads of a page each, of rows of tables in files, by all ranks together."""
    gather_gbps: float
    """An all-gather over the ranks: bytes of the whole result a second."""
    tflops: float
    hbm_gbps: float
    launch_s: float
    """Of a kernel by itself."""
    model_launch_s: float
    """Of one that a model's Python launches."""
    triton_launch_s: float
    """Of a Triton kernel, with its Python."""
    fill_gbps: float
    """Filling host memory from the page cache, and page-locking it."""
    place_gbps: float
    """From the page cache through stages in host memory onto the GPU, both at once."""
    host_read_gbps: float
    """Reads of host memory by all threads but one, while the other ranks of the node do the same."""
    host_read_link_cost: float = 1.0
    """Bytes of host memory that are not read for each byte that crosses a link from there meanwhile."""
    link_read_cost: float = 0.0
    """The part of its rate that a link loses while processors read host memory."""
    first_pass_s: float = 0.0
    """What a run's first pass takes longer than others."""
    first_layer_s: float = 0.0
    """The same for each layer."""
    reads_host: bool = False
    """That was measured: attention on the CPU may be compared with others."""
    fitted: FittedFigures
    """The parts of these rates that kernels reach, and host times, on the GPU that is most like this one."""
    projected: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """A plan in seconds. `prefill_s` is a pass with as many prompts as it may compute and nothing else, `decode_s` one
    with a token of every live row."""

    load_s: float
    prefill_s: float
    decode_s: float
    tokens_per_second: float
    """All ranks together, prefill included."""
    streamed_bytes: int
    """Of weights, that cross one rank's link in a pass, an encoder's blocks left out."""
    fetched_bytes: int
    """Of keys and values, that cross it in a decode step."""
    binds: Resource
    """What a decode step waits for."""
    entering_rows: int = 1
    """Rows had better wait for each other until so many enter together."""

    def first_token_s(self, prompt_tokens: int, prefill_tokens: int) -> float:
        """Seconds from the start until the first prompt's first token is known; a pass computes `prefill_tokens`."""
        return self.load_s + ceil(prompt_tokens / prefill_tokens) * self.prefill_s

    def job_s(self, requests: int, new_tokens: float) -> float:
        """Seconds from the start until all requests have their `new_tokens`."""
        return self.load_s + requests * new_tokens / self.tokens_per_second


def time_plan(
    anatomy: Anatomy,
    choice: Choice,
    workload: Workload,
    speeds: Speeds,
    world_size: int,
    requests: int | None,
    *,
    static: bool = False,
) -> Timing:
    """The time of `requests` requests (None: without end) on `world_size` ranks; `static`: none enters while others
    live."""
    decoder, *encoder = walks(anatomy, choice)
    waits, streamed = _waits(anatomy, [decoder], choice, speeds, world_size)
    prompt_waits, _ = _waits(anatomy, [decoder, *encoder], choice, speeds, world_size)
    if workload.shape.cpu_rows:  # weights that cross the link are read from the memory that the CPU reads
        for waiting in (waits, prompt_waits):
            taken = waiting["link"] * speeds.link_gbps * speeds.host_read_link_cost
            waiting["host memory"] = taken / speeds.host_read_gbps
    expansion = _times(_expansion(anatomy, choice, workload), speeds)
    rows = None if requests is None else -(-requests // world_size)
    _, fetched = _fetched_bytes(anatomy, choice, workload)
    cost = _cost(anatomy, choice, workload, speeds)
    count = _Static if static or not workload.shares_passes else _Mixed if workload.is_mixed else _Continuous
    overlaps = descriptor_of(choice.engine).overlaps
    routed = _routed(anatomy, choice, workload, decoder, waits, speeds) if choice.routed_tokens else None
    work = count(workload, cost, expansion, prompt_waits, waits, overlaps, routed)
    prefill_s, _ = work.passing(1, 0)
    decode_s, binds = work.passing(0, 1)
    tokens, seconds = work.tokens_and_seconds(rows)
    if requests is not None:
        tokens *= requests / (rows or 1) / world_size
        seconds += speeds.first_pass_s + len(anatomy.blocks) * speeds.first_layer_s
        seconds += _capturing_s(anatomy, choice, workload, speeds) if choice.graph_tokens else 0.0
    return Timing(
        load_s=_load_s(anatomy, choice, [decoder, *encoder], speeds),
        prefill_s=prefill_s,
        decode_s=decode_s,
        tokens_per_second=tokens * world_size / seconds,
        streamed_bytes=streamed,
        fetched_bytes=int(fetched),
        binds=binds,
        entering_rows=1 if count is _Static else work.entering_rows,
    )


def _waits(
    anatomy: Anatomy, visited: Sequence[Walk], choice: Choice, speeds: Speeds, world_size: int
) -> tuple[dict[Resource, float], int]:
    """Seconds that the blocks `visited` in a pass keep links, disk and the engine itself busy, and bytes of weights
    that cross one rank's link."""
    moved = descriptor_of(choice.engine).transfers(anatomy, choice, visited, world_size, speeds.fitted.engines)
    waits: dict[Resource, float] = {
        "link": moved.link_bytes / speeds.link_gbps / 1e9 / moved.link_share,
        "disk": moved.disk_bytes / speeds.disk_gbps / 1e9,
        "all-gather": moved.gathered_bytes / speeds.gather_gbps / 1e9,
        "kernel launches": moved.launches * speeds.model_launch_s,
    }
    return waits, moved.link_bytes


@dataclass(frozen=True, slots=True)
class _Routed:
    """Passes of `tokens` or fewer, which wait in each layer for the experts that their tokens are routed to."""

    tokens: int
    anatomy: Anatomy
    waits: dict[Resource, float]
    """Of all that is no expert."""
    experts: dict[Resource, float]
    """Seconds that all experts would keep link and disk busy."""
    expanded: float
    """The part of what is expanded that is no expert."""
    asking_s: float
    """Until the host knows which experts are wanted, in all layers that stream."""
    cost: _Cost
    """Of passes: experts that are brought one by one compute at once."""

    def passing(
        self, tokens: float, work: dict[Resource, float], expansion: dict[Resource, float], *, overlaps: bool
    ) -> tuple[float, Resource]:
        """Seconds of a pass of so many tokens, as `_pass` says."""
        share = routed_share(self.anatomy, tokens)
        part = self.expanded + (1 - self.expanded) * share
        seconds, binds = _pass(work, {name: part * at for name, at in expansion.items()}, self.waits, overlaps=overlaps)
        slowest = max(self.experts, key=lambda resource: self.experts[resource])
        experts_s = share * sum(self.experts.values())  # what is read is copied only then
        return seconds + experts_s + self.asking_s, slowest if experts_s > seconds else binds


def _routed(
    anatomy: Anatomy,
    choice: Choice,
    workload: Workload,
    walk: Walk,
    waits: dict[Resource, float],
    speeds: Speeds,
) -> _Routed:
    parts = expert_bytes(walk)
    layers = sum(lane.streamed for lane in walk.lanes[1:]) / choice.expert_parts
    experts: dict[Resource, float] = {"link": waits["link"] * parts.of_link, "disk": waits["disk"] * parts.of_disk}
    return _Routed(
        tokens=choice.routed_tokens,
        anatomy=anatomy,
        waits={name: seconds - experts.get(name, 0.0) for name, seconds in waits.items()},
        experts=experts,
        expanded=1 - parts.of_link,
        asking_s=layers * _ASKING_LAUNCHES * speeds.model_launch_s,
        cost=_cost(anatomy, replace(choice, expert_parts=1), workload, speeds),
    )


def _expansion(anatomy: Anatomy, choice: Choice, workload: Workload) -> tuple[Kernels, ...]:
    """The kernels that turn codes into weights again in a pass: ours, a kernel and a copy for each block, or a
    checkpoint's."""
    if workload.expansion is not None:
        return workload.expansion.kernels
    if choice.wire == "model" or _multiplies_codes(choice, workload):
        return ()
    layers = with_layers(anatomy, choice.embeddings)
    both = zip(pieces(layers), pieces(layers, choice.wire), strict=True)
    return (Kernels(1.0, tuple(kernel for full, coded in both for kernel in (Kernel(0, full + coded), Kernel(0, 0)))),)


def _multiplies_codes(choice: Choice, workload: Workload) -> bool:
    return choice.wire != "model" and workload.multiplies_codes and workload.packed is not None


def _fetched_bytes(anatomy: Anatomy, choice: Choice, workload: Workload) -> tuple[float, float]:
    """Keys and values that cross the link, for as many prompts as a pass computes, and for a step of all rows."""
    if not choice.host_rows:
        return 0.0, 0.0
    prompt, new = workload.prompt_tokens, workload.new_tokens
    row = fetched_bytes(anatomy, choice.kv_dtype, prompt + new / 2)
    begun = fetched_bytes(anatomy, choice.kv_dtype, prompt / 2) if workload.prompts_rows < 1 else 0.0
    if workload.host is not None and workload.host.cpu_rows:
        return begun, choice.host_rows * anatomy.step_row_bytes(workload.host) * len(anatomy.records(choice.kv_dtype))
    return begun, choice.host_rows * row


def _load_s(anatomy: Anatomy, choice: Choice, visited: Sequence[Walk], speeds: Speeds) -> float:
    """Seconds until all blocks are where they rest; a store that is not there yet takes longer."""
    places_blocks = descriptor_of(choice.engine).places_blocks
    resident = sum(walk.resident_bytes for walk in visited) if places_blocks else 0
    on_disk = sum(walk.nvme_bytes for walk in visited)
    from_store = resident / speeds.disk_gbps if choice.nvme_blocks else resident / speeds.place_gbps
    encoded = 0 if choice.wire == "model" or choice.nvme_blocks else sum(pieces(anatomy))
    tables = sum(table_pieces(anatomy, choice.embeddings))
    return (
        (sum(walk.nbytes for walk in visited) + tables - resident - on_disk) / speeds.fill_gbps
        + from_store
        + encoded / speeds.fitted.engines.encode_gbps
    ) / 1e9


_Cost = Callable[[float, float, float], dict[Resource, float]]
"""Seconds of each resource that the forwards of a pass take, by the arguments of `_Work.passing`."""


def _cost(anatomy: Anatomy, choice: Choice, workload: Workload, speeds: Speeds) -> _Cost:
    return (_padded if workload.packed is None else _packed)(anatomy, choice, workload, speeds)


def _copies_s(anatomy: Anatomy, choice: Choice, workload: Workload, speeds: Speeds) -> float:
    """Seconds that the host takes for copies to and from host memory in a step of all rows, without a model's Python
    around them: one for what each row has in a layer, or a kernel for all rows of a micro-batch where that is short;
    new tokens leave by a kernel."""
    tokens = workload.prompt_tokens + workload.new_tokens / 2
    kernels_s, seconds = -(-choice.host_rows // choice.micro_batch_rows) * speeds.triton_launch_s, 0.0
    for nbytes, layers in row_bytes(anatomy, choice.kv_dtype, tokens):
        by_engines = nbytes >= LONG_RUN_BYTES
        seconds += layers * (kernels_s + (choice.host_rows * speeds.launch_s if by_engines else kernels_s))
    return seconds


def _add_gathering(
    times: dict[Resource, float], anatomy: Anatomy, choice: Choice, speeds: Speeds, tokens: float, forwards: int
) -> None:
    """Add what gathering rows of tables takes for so many tokens in so many forwards: the host waits for their numbers,
    reads and writes each row, and a kernel fetches them over the link. In files, all pages that they lie in are read,
    as if none had been before."""
    if choice.embeddings == "gpu":
        return
    nbytes = tokens * sum(table.token_bytes for table in anatomy.tables)
    times["GPU memory"] += nbytes / speeds.link_gbps / 1e9
    times["kernel launches"] += 2 * nbytes / speeds.fill_gbps / 1e9
    times["kernel launches"] += _GATHER_LAUNCHES * forwards * len(anatomy.tables) * speeds.model_launch_s
    for table in anatomy.tables if choice.embeddings == "disk" else ():
        rows = min(tokens * table.rows_per_token, forwards * table.rows)
        times["disk rows"] += rows * (1 + table.row_bytes / _PAGE_BYTES) / speeds.disk_reads_per_s


def _attended_s(anatomy: Anatomy, choice: Choice, workload: Workload, speeds: Speeds) -> float:
    """Seconds that the CPU takes to attend for a step of all rows in host memory; 0 where it does not."""
    if not workload.shape.cpu_rows:
        return 0.0
    row = fetched_bytes(anatomy, choice.kv_dtype, workload.prompt_tokens + workload.new_tokens / 2)
    return choice.host_rows * row / speeds.host_read_gbps / speeds.fitted.passes.host_attention_share / 1e9


def _padded(anatomy: Anatomy, choice: Choice, workload: Workload, speeds: Speeds) -> _Cost:
    """Micro-batches of prompts and others of steps: one of few rows launches as much as one of many."""
    started, fetched = _fetched_bytes(anatomy, choice, workload)
    of_prompts, of_decode = _work(workload.prompts, speeds), _decode_work(workload, speeds)
    of_prompts["link"] += started / speeds.link_gbps / 1e9
    of_decode["link"] += fetched / speeds.link_gbps / 1e9
    batches = -(-choice.host_rows // choice.micro_batch_rows)
    of_decode["kernel launches"] += len(anatomy.cache) * batches * speeds.fitted.passes.host_layer_s
    copies_s = _copies_s(anatomy, choice, workload, speeds)
    _add_gathering(of_prompts, anatomy, choice, speeds, workload.shape.prefill_tokens, len(workload.prompts))
    _add_gathering(of_decode, anatomy, choice, speeds, workload.shape.rows, len(workload.last_decode))

    def cost(prompts: float, decode: float, forwards: float) -> dict[Resource, float]:
        both = {name: prompts * of_prompts[name] + decode * of_decode[name] for name in of_prompts}
        more = max(0.0, forwards / len(workload.prompts) - prompts)
        steps = len(workload.last_decode)
        missing = ceil(decode * steps - _FEW) / steps - decode if steps else 0.0
        launches = more * of_prompts["kernel launches"] + missing * of_decode["kernel launches"]
        both["kernel launches"] += launches + decode * copies_s
        return both

    return cost


def _packed(anatomy: Anatomy, choice: Choice, workload: Workload, speeds: Speeds) -> _Cost:
    """Forwards of which each takes steps and parts of prompts, as many as there is room for; rows on the GPU and rows
    in host memory have forwards of their own."""
    assert workload.packed is not None
    shape, forwards, host = workload.shape, workload.packed.forwards, speeds.fitted.passes
    of_forwards = _forward_times(forwards, speeds, _coded(anatomy, choice, workload), _layers(anatomy, choice, shape))
    attended_s = _attended_s(anatomy, choice, workload, speeds)
    cpu_forwards = workload.host.cpu_forwards if workload.host is not None else 1
    copies_s = 0.0 if attended_s else _copies_s(anatomy, choice, workload, speeds)
    # Beside forwards: attention, of which each forward launches some however many rows it holds, and recurrent modules.
    of_prompts, of_decode = (_times(kernels, speeds) for kernels in (workload.packed.prompts, workload.packed.decode))
    attending_s = sum(group.times for group in workload.packed.prompts) * host.attention_launches
    attending_s *= speeds.triton_launch_s
    of_prompts["kernel launches"], of_decode["kernel launches"] = 0.0, shape.rows * host.row_s + copies_s
    both_fetched = _fetched_bytes(anatomy, choice, workload)
    for times, mixing, fetched in zip((of_prompts, of_decode), workload.packed.mixing, both_fetched, strict=True):
        times["link"] += fetched / speeds.link_gbps / 1e9
        for name, seconds in _times(mixing, speeds, _mixing_launch_s).items():
            times[name] += seconds

    def count_of(prompts: float, decode: float, rows: int) -> int:
        """Forwards of the rows of one side, which have so large a share of the prompts."""
        tokens = prompts * shape.prefill_tokens * rows / shape.rows + decode * rows
        least = -(-rows // shape.micro_batch_rows)
        return max(1, ceil(tokens / shape.forward_tokens - _FEW), ceil(decode * least - _FEW)) if rows else 0

    def cost(prompts: float, decode: float, _: float) -> dict[Resource, float]:
        tokens = prompts * shape.prefill_tokens + decode * shape.rows
        on_host = count_of(prompts, decode, shape.host_rows)
        on_host += cpu_forwards - 1 if decode and attended_s else 0
        count = on_host + count_of(prompts, decode, shape.rows - shape.host_rows)
        choices = (decode * shape.rows + prompts * workload.prompts_rows) / count
        one, more = of_forwards.of(tokens / count, choice.graph_tokens), of_forwards.choices(max(1.0, choices))
        both = {
            name: count * (one[name] + more[name]) + prompts * of_prompts[name] + decode * of_decode[name]
            for name in one
        }
        both["kernel launches"] += count * ((prompts > 0) + (decode > 0)) * attending_s
        both["kernel launches"] += on_host * len(anatomy.cache) * host.host_layer_s
        _add_gathering(both, anatomy, choice, speeds, tokens, count)
        if decode and attended_s:  # in each layer the CPU waits for a forward, which replays no graph
            steps = of_forwards.launched(decode * shape.host_rows / cpu_forwards)
            both["kernel launches"] += cpu_forwards * (steps["kernel launches"] - one["kernel launches"])
            launches_s = steps["kernel launches"] + len(anatomy.cache) * host.host_attention_layer_s
            alone = max(steps["arithmetic"] + steps["GPU memory"], launches_s)
            meanwhile = decode * attended_s * (1 - 1 / cpu_forwards)  # it attends for the other forward
            both["host memory"] = decode * attended_s + max(0.0, alone - meanwhile)
            both["link"] += decode * attended_s * speeds.link_read_cost
        return both

    return cost


def _coded(anatomy: Anatomy, choice: Choice, workload: Workload) -> CodedLayers | None:
    """The layers, where their weights are multiplied as codes."""
    if not _multiplies_codes(choice, workload):
        return None
    return coded_layers(with_layers(anatomy, choice.embeddings), choice.wire)


def launches_bind(anatomy: Anatomy, choice: Choice, workload: Workload, speeds: Speeds) -> Callable[[int], bool]:
    """A function that says whether a packed forward of so many tokens, steps before all else, takes the host at least
    half as long as the GPU where it is launched kernel by kernel: hosts are slower at times."""
    cost, shape = _packed(anatomy, replace(choice, graph_tokens=0), workload, speeds), workload.shape

    def bind(tokens: int) -> bool:
        steps = min(tokens, shape.rows)
        one = cost((tokens - steps) / shape.prefill_tokens, steps / shape.rows, 0)
        return 2 * one["kernel launches"] > one["arithmetic"] + one["GPU memory"]

    return bind


def _capturing_s(anatomy: Anatomy, choice: Choice, workload: Workload, speeds: Speeds) -> float:
    """Seconds that a job takes longer until graphs are there: of each size that is captured, two forwards are launched
    kernel by kernel, the second while it is captured. Steps grow fewer in the end, as rows do that entered together."""
    assert workload.packed is not None
    coded, shape = _coded(anatomy, choice, workload), workload.shape
    extra = _capturing(workload.packed.forwards, speeds, coded, _layers(anatomy, choice, shape), choice.graph_tokens)
    largest, captured, serving = graph_size(shape.rows, choice.graph_tokens), list[float](), inf
    for size, seconds in reversed(extra):
        if size <= largest and size * SERVED_TIMES < serving:
            captured.append(seconds)
            serving = size if size <= FLAT_TOKENS else inf
    waves = len(captured) if workload.is_mixed else ceil(shape.rows / workload.prompts_a_pass)
    most = graph_size(shape.prefill_tokens + shape.rows, choice.graph_tokens)
    of_prompts = (seconds for size, seconds in extra if shape.prefill_tokens <= size <= most)
    return sum(captured[:waves]) + sum(of_prompts)


class _Layers(NamedTuple):
    """What the times of forwards take from a model's layers."""

    launched_share: float
    """Of layers without graphs."""
    routing: tuple[int, int]
    """Experts of a layer, and how many of them each token is routed to; one where there are none."""
    parts: int
    """In which the experts compute."""
    simulated_parts: int
    """In which they computed in the simulation."""

    def computed(self, kernels: Sequence[Kernels], tokens: int, coded: CodedLayers | None) -> tuple[Kernels, ...]:
        """The kernels of a forward of so many tokens, as runs choose them."""
        own = in_parts(kernels, self.parts) if self.parts > 1 else at_once(kernels, self.simulated_parts)
        return with_many_rows(own, tokens, *self.routing) if coded is None else on_codes(own, tokens, coded)


def _layers(anatomy: Anatomy, choice: Choice, shape: Shape) -> _Layers:
    routing = next(((one.count, one.each) for one in anatomy.experts), (1, 1))
    return _Layers(launched_share(anatomy), routing, choice.expert_parts, shape.expert_parts)


@lru_cache(maxsize=256)
def _capturing(
    forwards: Forwards, speeds: Speeds, coded: CodedLayers | None, layers: _Layers, most: int
) -> tuple[tuple[int, float], ...]:
    """The sizes of graphs for up to `most` tokens, each with the seconds that two forwards take longer without, and
    that capturing takes."""
    times, found = _forward_times(forwards, speeds, coded, layers), list[tuple[int, float]]()
    count = sum(group.times for group in forwards.tokens[0][1][1:]) * (1 - layers.launched_share)
    capture_s = count * speeds.fitted.passes.capture_layer_s
    for size in graph_sizes(most):
        launched, replayed = times.launched(size), times.replayed(size)
        gpu_s = launched["arithmetic"] + launched["GPU memory"]
        longer = (max(gpu_s, each["kernel launches"]) for each in (launched, replayed))
        found.append((size, capture_s + 2 * max(0.0, next(longer) - next(longer))))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _ForwardTimes:
    """Seconds of each resource by a forward's tokens, where layers launch their kernels and where they launch their
    graphs, whatever these hold; and what more choices than one add."""

    launched: _Line
    replayed: _Line
    choices: _Line

    def of(self, tokens: float, graph_tokens: int) -> dict[Resource, float]:
        """A forward of so many tokens, where those of up to `graph_tokens` replay graphs."""
        return self.replayed(graph_size(tokens, graph_tokens)) if tokens <= graph_tokens else self.launched(tokens)


@lru_cache(maxsize=64)
def _forward_times(forwards: Forwards, speeds: Speeds, coded: CodedLayers | None, layers: _Layers) -> _ForwardTimes:
    """`coded`: the layers, where weights of `--wire` are multiplied as codes."""
    many, host = forwards.tokens[-1][0], speeds.fitted.passes
    launched_share, short = layers.launched_share, speeds.fitted.kernels
    copying_s = (1 - launched_share) * host.graph_copies * (short.shortest_s + short.gap_s)
    replay_s = host.graph_launches * host.packed_launches * speeds.model_launch_s
    launched, replayed, chosen = (list[tuple[float, dict[Resource, float]]]() for _ in range(3))
    for at, kernels in forwards.tokens:
        groups = layers.computed(kernels, at, coded)
        times = _times(groups[1:], speeds, _packed_launch_s)
        outside = _times(groups[:1], speeds, _own_launch_s)
        outside_s = outside["kernel launches"] + host.micro_batch_s
        times = {name: times[name] + outside[name] for name in times}
        times["kernel launches"] += host.micro_batch_s
        launched.append((at, times))
        count = sum(group.times for group in kernels[1:])
        inside_s = count * replay_s + launched_share * (times["kernel launches"] - outside_s - count * replay_s)
        copied_s = times["GPU memory"] + count * copying_s
        replayed.append((at, {**times, "GPU memory": copied_s, "kernel launches": outside_s + inside_s}))
    for at, kernels in forwards.choices:
        groups = layers.computed(kernels, many, coded)
        chosen.append((at, _times(groups, speeds, _packed_launch_s)))
    fewest = chosen[0][1]
    more = [(at, {name: times[name] - fewest[name] for name in times}) for at, times in chosen]
    return _ForwardTimes(_Line(launched), _Line(replayed), _Line(more))


def _launch_s(group: Kernels, speeds: Speeds) -> float:
    """Seconds that the host takes to launch the kernels of `group` once."""
    return len(group.kernels) * speeds.model_launch_s


def _own_launch_s(group: Kernels, speeds: Speeds) -> float:
    """The same where some of the kernels are Triton's."""
    return _launched_s(group, speeds, 1.0)


def _mixing_launch_s(group: Kernels, speeds: Speeds) -> float:
    """The same of recurrent modules, which launch most of theirs in functions of their own."""
    return _launched_s(group, speeds, speeds.fitted.passes.recurrent_launches)


def _packed_launch_s(group: Kernels, speeds: Speeds) -> float:
    """The same in a layer of a packed forward, with the Python of its modules."""
    return _launched_s(group, speeds, speeds.fitted.passes.packed_launches)


def _launched_s(group: Kernels, speeds: Speeds, times: float) -> float:
    """The same where a launch that is not Triton's takes so many times a model's."""
    of_triton = [speeds.fitted.passes.triton_kernels.get(kernel.operator, 0) for kernel in group.kernels]
    return sum(of_triton) * speeds.triton_launch_s + of_triton.count(0) * times * speeds.model_launch_s


class _Line:
    """Seconds of each resource between and beyond some that are known."""

    def __init__(self, known: Sequence[tuple[float, dict[Resource, float]]]) -> None:
        self._known, self._at = known, [at for at, _ in known]

    def __call__(self, at: float) -> dict[Resource, float]:
        above = min(max(1, bisect(self._at, at)), len(self._at) - 1)
        (low, one), (high, other) = self._known[above - 1 : above + 1]
        share = (at - low) / (high - low)
        if 0 <= share <= 1:
            return {name: seconds + share * (other[name] - seconds) for name, seconds in one.items()}
        return {name: max(0.0, seconds + share * (other[name] - seconds)) for name, seconds in one.items()}


@dataclass(frozen=True, slots=True)
class _Work(ABC):
    """The work of passes on one rank, in seconds of each resource."""

    workload: Workload
    cost: _Cost
    expansion: dict[Resource, float]
    """Of codes into weights, once a pass."""
    prompt_waits: dict[Resource, float]
    """Of a pass that begins with an encoder's blocks; without one, those of every pass."""
    waits: dict[Resource, float]
    overlaps: bool
    """The engine copies weights while it computes."""
    routed: _Routed | None
    """None where every pass brings all experts."""
    known: dict[tuple[float, float, float], tuple[float, Resource]] = field(default_factory=dict, init=False)
    """What `passing` found: most passes of a job are alike."""

    def seconds(self, prompts: float, decode: float, forwards: float = 0.0) -> float:
        """Seconds of a pass, as `passing` says."""
        return self.passing(prompts, decode, forwards)[0]

    def passing(self, prompts: float, decode: float, forwards: float = 0.0) -> tuple[float, Resource]:
        """Seconds of a pass with such parts of a full load of prompts and of a step of all rows, and what they are
        spent on; prompts take so many forwards, or as many as their part of a full load's.
        """
        found = self.known.get((prompts, decode, forwards))
        if found is None:
            tokens = prompts * self.workload.shape.prefill_tokens + decode * self.workload.shape.rows
            if self.routed is not None and tokens <= self.routed.tokens:
                both = self.routed.cost(prompts, decode, forwards)
                found = self.routed.passing(tokens, both, self.expansion, overlaps=self.overlaps)
            else:
                waits = self.prompt_waits if prompts else self.waits
                found = _pass(self.cost(prompts, decode, forwards), self.expansion, waits, overlaps=self.overlaps)
            self.known[prompts, decode, forwards] = found
        return found

    def filling_s(self, rows: float) -> float:
        """Seconds until so many rows have entered, which from then on have a step in every pass."""
        workload = self.workload
        part, running = workload.prompts_a_pass / workload.prompts_rows, rows / workload.shape.rows / 2
        return rows / workload.prompts_a_pass * self.seconds(part, running, 1)

    @abstractmethod
    def tokens_and_seconds(self, rows: int | None) -> tuple[float, float]:
        """Tokens of so many rows, or of as many as show the speed of a job without end, and how long they take."""

    @property
    def entering_rows(self) -> int:
        """The number of rows that had best enter together where one ends now and then: each forward for prompts takes
        its launches, places that wait for others' stay empty. Few, where more would gain next to nothing."""
        most = int(max(1, min(self.workload.prompts_a_pass, self.workload.shape.rows / _FEWEST_GROUPS)))
        tried, costs = [1], [self.steady_s(1)]
        while tried[-1] < most:
            tried.append(min(most, ceil(tried[-1] * _NEXT_TRIED)))
            costs.append(self.steady_s(tried[-1]))
        return next(rows for rows, cost in zip(tried, costs, strict=True) if cost <= min(costs) * _NEXT_TO_NOTHING)

    def steady_s(self, together: int) -> float:
        """Seconds for each row while rows end at any time and so many enter together, or all that end in a pass."""
        live = self.workload.shape.rows - (together - 1) / 2
        leaving = live / self.workload.new_tokens
        entering = max(together, leaving)
        share = leaving / entering
        prompts = self.seconds(entering / self.workload.prompts_rows, 1, 1)
        return (share * prompts + (1 - share) * self.seconds(0, 1)) / leaving


class _Static(_Work):
    def tokens_and_seconds(self, rows: int | None) -> tuple[float, float]:
        """A batch lasts as long as its longest row, and the others leave it before."""
        live, new, most = self.workload.shape.rows, self.workload.new_tokens, self.workload.most_new_tokens
        count = live if rows is None else rows
        filling_s = self.filling_s(live) if live > self.workload.prompts_a_pass else self.seconds(1, 0)
        return count * new, -(-count // live) * (filling_s + (most - 1) * self.seconds(0, new / most))


@dataclass(frozen=True, slots=True)
class _Progress:
    """How far a job has come: rows that wait, that have a place, and whose prompts are computed; the seconds that it
    took, and the rows whose prompts were computed in each of the last strides."""

    waiting: float
    starting: float
    running: float
    seconds: float
    entered: deque[float]

    @classmethod
    def of(cls, rows: float, strides: int) -> _Progress:
        """The start of a job of so many rows, which live for so many strides."""
        return cls(rows, 0.0, 0.0, 0.0, deque([0.0] * strides, maxlen=strides))


class _Continuous(_Work):
    def tokens_and_seconds(self, rows: int | None) -> tuple[float, float]:
        """Rows that entered together end together, so prompts come in waves: all of the first few are walked through,
        and the others take as long as the last of these.
        """
        new = self.workload.new_tokens
        wave = min(self.workload.shape.rows, self.workload.prompts_a_pass * new)
        more = 0 if rows is None else max(0, ceil(rows / wave - _WAVES))
        count = _WAVES * wave if rows is None else rows - more * wave
        if rows is not None and not more:
            return rows * new, self._walk(_Progress.of(rows, self._strides))[0]
        # A job of a wave less is the same until its last row has entered.
        until = self._walk(_Progress.of(count, self._strides), kept=wave)[1]
        fewer_s, _ = self._walk(replace(until, waiting=until.waiting - wave, entered=until.entered.copy()))
        seconds, _ = self._walk(until)
        wave_s = seconds - fewer_s
        return (wave * new, wave_s) if rows is None else (rows * new, seconds + more * wave_s)

    @property
    def _strides(self) -> int:
        return min(round(self.workload.new_tokens), _STRIDES)

    def _walk(self, at: _Progress, kept: float = 0.0) -> tuple[float, _Progress]:
        """Seconds from the start until all rows have come and gone, or until there is no room left in which `kept` rows
        would go on waiting; in strides of one pass or, where rows live long, of more."""
        live, passes = self.workload.shape.rows, self.workload.new_tokens / self._strides
        most, full = self.workload.prompts_a_pass * passes, self.workload.prompts_rows * passes
        waiting, starting, running, seconds, entered = at.waiting, at.starting, at.running, at.seconds, at.entered
        known, forwards = self.known, len(self.workload.prompts)
        while waiting + starting + running > _FEW:  # each turn of which counts: a search comes here a million times
            admitted = live - starting - running
            if admitted > waiting - kept:
                if kept:
                    break
                admitted = waiting
            waiting -= admitted
            starting += admitted
            entering = most if most < starting else starting
            key = entering / full, running / live, forwards * entering / most
            seconds += passes * (known[key] if key in known else self.passing(*key))[0]
            entered.append(entering)
            starting -= entering
            running += entering - entered[0]
        return seconds, _Progress(waiting, starting, running, seconds, entered)


class _Mixed(_Work):
    """Rows of different lengths, as if lengths were spread evenly: at first all enter, as many in a pass as it has room
    for their prompts, then one after the other as others end, and in the end they grow fewer."""

    def tokens_and_seconds(self, rows: int | None) -> tuple[float, float]:
        live, together = self.workload.shape.rows, self.entering_rows
        new = self.workload.new_tokens
        if rows is None:
            return live * new, live * self.steady_s(together)
        entering = self.workload.prompts_a_pass * self.workload.most_new_tokens  # in the time of the longest row
        walked = min(rows, _MIXED_WAVES * live, ceil(2 * _MIXED_WAVES * entering))
        return rows * new, self._walk(walked, together) + (rows - walked) * self.steady_s(together)

    def _walk(self, rows: float, together: int) -> float:
        """Seconds until so many rows have come and gone, in strides; where few enter, so many enter together."""
        workload, live = self.workload, self.workload.shape.rows
        strides = min(workload.most_new_tokens, _MIXED_STRIDES)
        passes = workload.most_new_tokens / strides
        # The part of the rows that live on, in each stride of their lives: all parts come to a row's tokens on average.
        power = workload.most_new_tokens / workload.new_tokens - 1
        left = [(1 - (stride + 0.5) / strides) ** power for stride in range(strides)]
        waiting, seconds, entered = float(rows), 0.0, deque[float](maxlen=strides - 1)
        while waiting > _FEW or any(entered):
            staying = sum(map(mul, entered, left[1:]))
            entering = max(0.0, min(waiting, live - staying, workload.prompts_a_pass * passes))
            waiting, running = waiting - entering, (staying + entering * left[0]) / live
            entered.appendleft(entering)
            at_once = min(workload.prompts_a_pass, max(together, entering / passes))
            with_prompts = min(passes, entering / at_once)
            seconds += (passes - with_prompts) * self.seconds(0, running)
            seconds += with_prompts * self.seconds(at_once / workload.prompts_rows, running, 1) if with_prompts else 0.0
        return seconds


def _decode_work(workload: Workload, speeds: Speeds) -> dict[Resource, float]:
    """The work of a step of all rows, on average over their way."""
    first, last = _work(workload.first_decode, speeds), _work(workload.last_decode, speeds)
    return {name: first[name] + workload.decode_at * (last[name] - first[name]) for name in first}


def _work(steps: Pass, speeds: Speeds) -> dict[Resource, float]:
    """Seconds that the kernels of `steps` take of each resource, one after the other."""
    times = _times((), speeds)
    for step, count in Counter(steps).items():
        for name, seconds in _step_times(step, speeds).items():
            times[name] += count * seconds
    return times


@lru_cache(maxsize=4096)
def _step_times(step: Step, speeds: Speeds) -> dict[Resource, float]:
    times = _times(step.kernels, speeds)
    times["kernel launches"] += speeds.fitted.passes.micro_batch_s
    return times


def _pass(
    work: dict[Resource, float], more: dict[Resource, float], waits: dict[Resource, float], *, overlaps: bool
) -> tuple[float, Resource]:
    """Seconds of a pass and what they are spent on: streams, host and GPU work beside each other, or, where an engine
    does not overlap them, kernels alone beside their launches.

    Where keys and values cross the link, it waits for the host now and then, and the host for it: 21 runs on H200s took
    about the root of the sum of both squares (docs/benchmarks-archive.md, "A sweep of settings").
    """
    both = {name: work[name] + more[name] for name in work}
    on_gpu: tuple[Resource, ...] = ("arithmetic", "GPU memory")
    rows_s = both["disk rows"]  # which neither the host nor the GPU does anything beside
    gpu_s = sum(both[resource] for resource in on_gpu) + rows_s
    times: dict[Resource, float] = {
        **waits,
        "link": waits["link"] + both["link"],
        "kernel launches": waits["kernel launches"] + both["kernel launches"] + rows_s,
        max(on_gpu, key=lambda resource: both[resource]): gpu_s,
    }
    if both["host memory"]:
        times["host memory"] = waits["host memory"] + both["host memory"]
    slowest = max(times, key=lambda resource: times[resource])
    if 2 * rows_s > times[slowest]:
        slowest, times["disk rows"] = "disk rows", times[slowest]
    if not overlaps:
        return sum(waits.values()) + max(both["kernel launches"], gpu_s), slowest
    together = hypot(times["link"], times["kernel launches"]) if both["link"] else 0.0
    return max(times[slowest], together), slowest


def _times(
    groups: Sequence[Kernels], speeds: Speeds, launch_s: Callable[[Kernels, Speeds], float] = _launch_s
) -> dict[Resource, float]:
    """Seconds of kernels by what each of them is bound by, and of launching them, where the host takes `launch_s` for
    a group."""
    times: dict[Resource, float] = {"arithmetic": 0.0, "GPU memory": 0.0, "kernel launches": 0.0, "link": 0.0}
    times["host memory"] = times["disk rows"] = 0.0
    for group in groups:
        launches, arithmetic, memory = _once(_Run(group.kernels), speeds, launch_s)
        times["kernel launches"] += group.times * launches
        times["arithmetic"] += group.times * arithmetic
        times["GPU memory"] += group.times * memory
    return times


class _Run:
    """Kernels one after the other, which are the same as others if they are the same object: recurrent layers launch
    tens of thousands for long prompts, and each setting that is tried asks for their time."""

    def __init__(self, kernels: tuple[Kernel, ...]) -> None:
        self.kernels = kernels

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Run) and self.kernels is other.kernels

    def __hash__(self) -> int:
        return id(self.kernels)


@lru_cache(maxsize=4096)
def _once(run: _Run, speeds: Speeds, launch_s: Callable[[Kernels, Speeds], float]) -> tuple[float, float, float]:
    """Seconds of launching the kernels of `run`, and of those that are bound by arithmetic, and by GPU memory, each
    with the gap before it."""
    by_arithmetic, by_memory, gap_s = 0.0, 0.0, speeds.fitted.kernels.gap_s
    for kernel in run.kernels:
        arithmetic, memory = kernel_s(kernel, speeds.fitted, speeds.tflops, speeds.hbm_gbps)
        if arithmetic > memory:
            by_arithmetic += arithmetic + gap_s
        else:
            by_memory += memory + gap_s
    return launch_s(Kernels(1.0, run.kernels), speeds), by_arithmetic, by_memory
