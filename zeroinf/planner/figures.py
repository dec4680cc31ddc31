"""Loads the figures that plans take for granted: fitted to runs on one GPU, or assumed where nothing was measured.

Both are JSON files in `configs/figures`, each group with its source and date: one file for each GPU that figures were
fitted on, and `unmeasured.json` for machines that `zeroinf doctor --measure` has not seen.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from zeroinf.paths import configs_directory
from zeroinf.planner.workload import Kernel, Pattern

Capability = tuple[int, int]
"""A GPU's compute capability, such as (9, 0)."""

_STRICT = {"extra": "forbid"}  # to pydantic, an unknown key is an error
_UNMEASURED = "unmeasured.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """A group of figures: where they come from, and when they were taken."""

    __pydantic_config__ = _STRICT

    source: str
    date: datetime.date


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductShares:
    """The parts of a GPU's measured rates that matrix products reach: of arithmetic, and of memory traffic."""

    __pydantic_config__ = _STRICT

    arithmetic: float
    memory: float


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelFigures(Figures):
    """The parts of a GPU's measured rates that kernels reach, by operator and by the order they read memory in."""

    products: ProductShares
    own_products: Mapping[str, ProductShares]
    """Of operators whose products differ from the others."""
    patterns: Mapping[Pattern, float]
    operators: Mapping[str, Mapping[Pattern, float]]
    """Of operators that differ from others of their pattern."""
    shortest_s: float
    """No kernel takes less."""
    gap_s: float
    """From the end of a kernel to the beginning of the next, which was launched before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpansionFigures(Figures):
    """The parts of the memory's rate at which kernels expand a checkpoint's quantized weights, by operator."""

    operators: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class PassFigures(Figures):
    """Host time of a pass: of its launches, and beside its kernels."""

    packed_launches: float
    """A launch in a layer of a packed forward with its modules' Python, in times of a model's launch by itself."""
    recurrent_launches: float
    """The same of recurrent modules between what a packed forward computes for all tokens."""
    triton_launch_s: float
    """A launch of a Triton kernel with its Python, where that was not measured."""
    triton_kernels: Mapping[str, int]
    """Operators that are Triton kernels, and what each takes the host, in bare launches of one."""
    attention_launches: int
    """Triton kernels that attention over pages launches in a layer for steps, and as many for prompts."""
    graph_launches: int
    """A layer that replays its CUDA graphs, beside its attention, in times of a launch in a packed forward."""
    graph_copies: int
    """Short kernels of a layer that copy between its graphs and what is outside of them."""
    capture_layer_s: float
    """Capturing the graphs of a layer for one number of tokens, beside its launches."""
    first_pass_s: float
    """What the first pass of a run takes longer than others: kernels and libraries are loaded, memory is taken."""
    first_layer_s: float
    """The same for each layer."""
    row_s: float
    """Each row of a packed pass."""
    micro_batch_s: float
    host_layer_s: float
    """Each layer of a micro-batch whose KV cache rests in host memory: events and streams, there and back."""
    host_attention_share: float
    """The part of host memory's read rate that attention on the CPU reaches."""
    host_attention_layer_s: float
    """Each layer of steps for which the CPU attends, beside their kernels and the attention: there and back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryFigures(Figures):
    """GPU memory that no replay counts."""

    unforeseen_bytes: int
    """Pages that the replay misses by one or two, and kernels loaded late."""
    small_tensors_bytes: int
    """Tokens on their way, and the like."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineFigures(Figures):
    """Rates and host times of engines."""

    encode_gbps: float
    """Quantizing weights for `--wire`, in GB/s of the weights."""
    accelerate_link_share: float
    """accelerate copies from memory that is not page-locked, and waits for each copy."""
    deepspeed_launches: int
    """Host time of DeepSpeed's ZeRO-3 to fetch and release a parameter, in kernel launches of a model."""
    deepspeed_gathered_launches: int
    """The same with an all-gather over several GPUs."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FittedFigures:
    """All figures that were fitted to runs on one kind of GPU; equal only to itself, since caches look it up often."""

    __pydantic_config__ = _STRICT

    gpu: str
    compute_capability: Capability
    kernels: KernelFigures
    expansion: ExpansionFigures
    passes: PassFigures
    memory: MemoryFigures
    engines: EngineFigures

    def shares(self, kernel: Kernel) -> ProductShares:
        """The parts of the GPU's arithmetic and memory rates that this kernel reaches."""
        if kernel.flops:
            return self.kernels.own_products.get(kernel.operator, self.kernels.products)
        return _shares(self, kernel.operator, kernel.pattern)


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """A GPU's dense half-precision products (10^12 operations/s), device memory and links between GPUs (GB/s)."""

    __pydantic_config__ = _STRICT

    compute_capability: Capability | None = None
    """None for cards of which it is not known."""
    tflops: float
    hbm_gbps: float
    gather_gbps: float
    """All-gather: of the cards of a generation that data centres link directly, else that of PCIe."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnmeasuredFigures(Figures):
    """Rates and memory of machines that were not measured; what follows from them is marked as estimated."""

    lane_gbps: Mapping[int, float]
    """One PCIe lane, by generation."""
    link_share: float
    """The part of it that page-locked copies reach."""
    data_sheet_share: float
    """The part of a data sheet's peak that runs reach."""
    link_gbps: float
    """A GPU whose link NVML does not describe."""
    disk_gbps: float
    disk_reads_per_s: float
    """Reads of a page each at any place of a file."""
    fill_gbps: float
    """Filling host memory from the page cache, and page-locking it."""
    host_read_gbps: float
    """Reads of host memory by all of a machine's cores: two channels of DDR4-3200 that are read at four fifths."""
    launch_s: float
    model_launch_s: float
    host: Card
    """The CPU where it computes."""
    cards: Sequence[Card]
    context_bytes: int
    workspace_bytes: int
    hopper_workspace_bytes: int
    """Workspaces of matrix products from compute capability 9.0 on."""
    collectives_bytes: int
    process_bytes: int
    """Host memory of a process with CUDA."""

    def card(self, capability: Capability | None) -> Card:
        """The card of that compute capability, or the one that stands for those that are not known."""
        cards = {card.compute_capability: card for card in self.cards}
        return cards.get(capability, cards[None])


@lru_cache(maxsize=1024)
def _shares(fitted: FittedFigures, operator: str, pattern: Pattern) -> ProductShares:
    own = fitted.kernels.operators.get(operator, {}).get(pattern)
    memory = own or fitted.expansion.operators.get(operator) or fitted.kernels.patterns[pattern]
    return ProductShares(arithmetic=1.0, memory=memory)


@cache
def unmeasured_figures() -> UnmeasuredFigures:
    """The figures that are assumed of a machine that was not measured."""
    from pydantic import TypeAdapter

    return TypeAdapter(UnmeasuredFigures).validate_json((configs_directory() / "figures" / _UNMEASURED).read_bytes())


@cache
def fitted_figures(capability: Capability | None = None) -> FittedFigures:
    """The figures fitted on the GPU whose compute capability is nearest; None is a machine without a GPU."""
    return nearest(_all_fitted(), capability or (0, 0))


def nearest(fitted: Sequence[FittedFigures], capability: Capability) -> FittedFigures:
    """The figures of the nearest compute capability: first by its major number, then by its minor one."""

    def distance(one: FittedFigures) -> tuple[int, int]:
        (major, minor), (own_major, own_minor) = capability, one.compute_capability
        return abs(own_major - major), abs(own_minor - minor)

    return min(fitted, key=distance)


@cache
def _all_fitted() -> tuple[FittedFigures, ...]:
    from pydantic import TypeAdapter

    files = sorted((configs_directory() / "figures").glob("*.json"))
    adapter = TypeAdapter(FittedFigures)
    return tuple(adapter.validate_json(file.read_bytes()) for file in files if file.name != _UNMEASURED)
