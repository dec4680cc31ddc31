"""Engine traits: the settings that each engine supports, and the facts that the planner uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from zeroinf.errors import UsageError
from zeroinf.model.anatomy import Anatomy
from zeroinf.planner.choice import Offload
from zeroinf.planner.wire import Wire

EngineName = Literal["stream", "zero", "resident", "accelerate", "tensor-parallel"]
ENGINE_NAMES: tuple[EngineName, ...] = get_args(EngineName)


@dataclass(frozen=True, kw_only=True, slots=True)
class Traits:
    """One engine's."""

    offloads: tuple[Offload, ...]
    """Where it can leave weights."""
    options: frozenset[str] = frozenset()
    """Those of the options for some engines only that it takes, by their names in Python."""
    stripes: bool = False
    """It spreads weights over several disks."""
    places_blocks: bool = False
    """It is told how many blocks stay on the GPU."""
    overlaps: bool = True
    """It copies weights while it computes."""
    is_timed: bool = True
    """The planner knows how fast it is."""
    packs: bool = False
    """It runs packed forwards, where the model can."""
    is_replayed: bool = False
    """The planner replays all that it allocates on a GPU, which is for one stream of kernels."""


TRAITS: dict[str, Traits] = {
    "stream": Traits(
        offloads=("none", "cpu", "nvme"),
        options=frozenset({"fetch", "resident_blocks", "pin_memory", "wire", "static_batches", "kv", "kv_dtype"}),
        stripes=True,
        places_blocks=True,
        packs=True,
        is_replayed=True,
    ),
    "zero": Traits(
        offloads=("none", "cpu", "nvme"), options=frozenset({"pin_memory", "aio", "zero_config"}), overlaps=False
    ),
    "resident": Traits(offloads=("none",), packs=True, is_replayed=True),
    "accelerate": Traits(
        offloads=("none", "cpu", "nvme"),
        options=frozenset({"resident_blocks"}),
        places_blocks=True,
        overlaps=False,
    ),
    "tensor-parallel": Traits(
        offloads=("none",), options=frozenset({"tensor_parallel", "tensor_parallel_size"}), is_timed=False
    ),
}


def why_padded(anatomy: Anatomy, engine: str, *, scored: bool = False) -> str:
    """Why rows of a forward are padded to one length; empty where they are packed into one sequence. `scored`: given
    tokens are scored, each prompt as a whole."""
    if not TRAITS[engine].packs:
        return f"the {engine} engine runs transformers' own batches"
    if scored:
        return "prompts are scored, each as a whole"
    return anatomy.padded_because


def packs_scores(anatomy: Anatomy, engine: str) -> bool:
    """Whether sequences that are scored lie side by side in one forward, which their continuations share."""
    return TRAITS[engine].packs and not anatomy.padded_because


def possible_offload(engine: str, asked: Offload | Literal["auto"]) -> Offload | Literal["auto"]:
    """`asked`, or where the engine leaves weights if it can do no other. Raises UsageError for what it cannot do."""
    offloads = TRAITS[engine].offloads
    if asked == "auto":
        return offloads[0] if len(offloads) == 1 else "auto"
    if asked not in offloads:
        raise UsageError(
            f"the {engine} engine keeps all weights on the GPUs: --offload {asked} has no effect with it",
            hint="--offload none, or --engine stream",
        )
    return asked


def needs_full_weights(engine: str, wire: Wire = "model") -> bool:
    """Whether an engine runs weights in full alone, so that packed ones have to be expanded before it is planned."""
    return engine != "stream" or wire != "model"


def expands_once(device: str, offload: str) -> bool:
    """Whether weights of a `.gguf` file are expanded before a run rather than in each pass: nothing crosses a link on a
    CPU, which takes longer to expand a layer than to run it. An offload that the user names keeps them as stored."""
    return device == "cpu" and offload in ("auto", "none")


def refuse_beside_codes(anatomy: Anatomy, engine: str, wire: Wire = "model") -> None:
    """Raise UsageError for what a checkpoint that is quantized already does without."""
    if (quantized := anatomy.quantized) is None:
        return
    if engine != "stream":
        raise UsageError(
            f"the {engine} engine does not run checkpoints that are quantized already, with {quantized.method}",
            hint="--engine stream, or the model's unquantized checkpoint",
        )
    if wire != "model":
        raise UsageError(
            f"--wire {wire} has no effect: the checkpoint is quantized already, with {quantized.method}",
            hint="drop it: weights are transferred as the checkpoint stores them",
        )
