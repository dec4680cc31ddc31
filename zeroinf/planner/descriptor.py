"""Engine descriptors: the one place where an engine says what it supports, what memory it takes and what it moves.

The planner, the options and the runs ask a descriptor instead of comparing engines' names. Each engine's folder under
`zeroinf/engines/` defines its descriptor, and `zeroinf.engines.registry` hands all of them in. Nothing here imports an
engine or torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from zeroinf.errors import UsageError
from zeroinf.model.anatomy import Anatomy
from zeroinf.model.cache_layout import HostSize
from zeroinf.planner.choice import Choice, Offload
from zeroinf.planner.memory import Overhead, Term
from zeroinf.planner.transfers import CountTransfers
from zeroinf.planner.wire import Wire
from zeroinf.planner.workload import Workload

if TYPE_CHECKING:
    from zeroinf.planner.plan import Plan


KERNEL_CAPABILITY = (8, 0)
"""The compute capability from which on kernels multiply by weights as they rest, in bfloat16 and float16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineTerms:
    """Memory terms of one engine for one question; the candidate is what varies."""

    gpu: Callable[[Choice, Workload], tuple[Term, ...]]
    """GPU memory of one rank at its highest."""
    elsewhere: Callable[[Choice, HostSize | None], tuple[Term, ...]]
    """Host memory and disk space of all ranks of a node, with such room for keys and values in host memory."""


MemoryTerms = Callable[["Plan", Callable[[bool], Overhead], Mapping[str, Any] | None], EngineTerms]
"""The terms for a plan with the user's settings, what a process takes beside tensors (by whether its ranks gather), and
the user's own DeepSpeed JSON."""


def _needs_nothing(plan: Plan, source: Any, disks: Sequence[Any], own_config: Mapping[str, Any] | None) -> None:
    """An engine that needs nothing of the disks before it starts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineDescriptor:
    """All that the rest of zeroinf knows of one engine."""

    name: str
    load: Callable[..., Any]
    """Loads it; the arguments are those of `zeroinf.engines.loading.load_engine`. Imports the engine's libraries."""
    memory_terms: MemoryTerms
    transfers: CountTransfers
    offloads: tuple[Offload, ...]
    """Where it can leave weights."""
    options: frozenset[str] = frozenset()
    """Those of the options for some engines only that it takes, by their names in Python."""
    libraries: tuple[str, ...] = ()
    """Distributions whose versions can change its completions, beside torch and transformers."""
    stripes: bool = False
    """It spreads weights over several disks."""
    places_blocks: bool = False
    """It is told how many layers stay on the GPU."""
    mixes_tiers: bool = False
    """Layers can rest in host memory and on NVMe at once, as many in each as there is room for."""
    overlaps: bool = True
    """It copies weights while it computes."""
    shares_passes: bool = False
    """Several micro-batches share one pass over the layers."""
    is_timed: bool = True
    """The planner knows how fast it is."""
    packs: bool = False
    """It runs packed forwards, where the model can."""
    is_replayed: bool = False
    """The planner replays all that it allocates on a GPU, which is for one stream of kernels."""
    captures_layers: bool = False
    """It replays CUDA graphs of layers in forwards of few tokens."""
    has_kernels: bool = False
    """Experts and norms compute by kernels of its own, in half precision, on GPUs from KERNEL_CAPABILITY on."""
    runs_quantized: bool = False
    """It runs checkpoints that are quantized already, as they are stored."""
    leaves_unread: bool = False
    """It does not load modules of multimodal models that text does not go through."""
    runs_encoders: bool = False
    """It runs models with an encoder."""
    plans_pageable: bool = False
    """A plan for another machine takes host memory that is not page-locked."""
    check_disks: Callable[[Plan, Any, Sequence[Any], Mapping[str, Any] | None], None] = _needs_nothing
    """Raises an error for what the disks of a plan with layers on NVMe lack: the plan, the model's source, the disks,
    and the user's own DeepSpeed JSON."""


_ENGINES: dict[str, EngineDescriptor] = {}


def register_engines(descriptors: Iterable[EngineDescriptor]) -> None:
    """Make engines known by their names; the first is the default."""
    _ENGINES.update({one.name: one for one in descriptors})


def descriptor_of(engine: str) -> EngineDescriptor:
    """The engine's descriptor. Raises KeyError for an engine that `zeroinf.engines.registry` does not hand in."""
    return _ENGINES[engine]


def engines() -> tuple[EngineDescriptor, ...]:
    """All engines, the default first."""
    return tuple(_ENGINES.values())


def default_engine() -> str:
    """The name of the engine that runs unless another one is asked for."""
    return next(iter(_ENGINES))


def as_run_by(anatomy: Anatomy, engine: str) -> Anatomy:
    """`anatomy` for an engine: where modules are wrapped or fetched one by one, recurrent ones run as transformers runs
    them, each once in a forward, and rows of models with states start and end together. What text does not go through
    is left out where the engine does not load it."""
    own = descriptor_of(engine)
    anatomy = anatomy.without_unread() if own.leaves_unread else anatomy
    return anatomy if own.shares_passes or own.packs else replace(anatomy, mixers=None)


def why_padded(anatomy: Anatomy, engine: str, *, on_host: bool = False, scored: bool = False) -> str:
    """Why rows of a forward are padded to one length; empty where they are packed into one sequence. `on_host`: keys
    and values of some rows rest in host memory. `scored`: given tokens are scored, each prompt as a whole."""
    if not descriptor_of(engine).packs:
        return f"the {engine} engine runs transformers' own batches"
    if scored:
        return "prompts are scored, each as a whole"
    if on_host:  # packed, each run of each sequence is a copy of its own in each layer, which takes the host longer
        return "keys and values rest in host memory"
    return anatomy.padded_because


def packs_scores(anatomy: Anatomy, engine: str) -> bool:
    """Whether sequences that are scored lie side by side in one forward, which their continuations share."""
    return descriptor_of(engine).packs and not anatomy.padded_because and anatomy.mixers is None


def possible_offload(engine: str, asked: Offload | Literal["auto"]) -> Offload | Literal["auto"]:
    """`asked`, or where the engine leaves weights if it can do no other. Raises UsageError for what it cannot do."""
    offloads = descriptor_of(engine).offloads
    if asked == "auto":
        return offloads[0] if len(offloads) == 1 else "auto"
    if asked not in offloads:
        raise UsageError(
            f"the {engine} engine keeps all weights on the GPUs: --offload {asked} has no effect with it",
            hint=f"--offload none, or --engine {default_engine()}",
        )
    return asked


def needs_full_weights(engine: str, wire: Wire = "model") -> bool:
    """Whether an engine runs weights in full alone, so that packed ones have to be expanded before it is planned."""
    return not descriptor_of(engine).runs_quantized or wire != "model"


def expands_once(device: str, offload: str) -> bool:
    """Whether weights of a `.gguf` file are expanded before a run rather than in each pass: nothing crosses a link on a
    CPU, which takes longer to expand a layer than to run it. An offload that the user names keeps them as stored."""
    return device == "cpu" and offload in ("auto", "none")


def refuse_beside_codes(anatomy: Anatomy, engine: str, wire: Wire = "model") -> None:
    """Raise UsageError for what a checkpoint that is quantized already does without."""
    if (quantized := anatomy.quantized) is None:
        return
    if not descriptor_of(engine).runs_quantized:
        raise UsageError(
            f"the {engine} engine does not run checkpoints that are quantized already, with {quantized.method}",
            hint=f"--engine {default_engine()}, or the model's unquantized checkpoint",
        )
    if wire != "model":
        raise UsageError(
            f"--wire {wire} has no effect: the checkpoint is quantized already, with {quantized.method}",
            hint="drop it: weights are transferred as the checkpoint stores them",
        )
