"""Suggests changes to a plan, or to one that does not fit, with the flags that make them.

The functions yield changes in order of their cost: settings before a disk, a disk before memory. They only name
changes; the caller plans each of them, so that no figure is guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal, get_args

from zeroinf.hardware.machine import Machine
from zeroinf.hardware.override import override
from zeroinf.hardware.rates import Rates
from zeroinf.model.anatomy import Anatomy
from zeroinf.planner.constraints import Constraints
from zeroinf.planner.decision import Candidate, Rejection
from zeroinf.planner.descriptor import default_engine, descriptor_of
from zeroinf.planner.memory import MemoryPlace, total
from zeroinf.planner.wire import Wire
from zeroinf.sizes import rate_text

Quality = Literal["exact", "near lossless", "lossy", "quality not measured"]
"""The effect of a change on completions, as measured in docs/benchmarks.md, "What wire formats cost in quality", from
the least to the worst that it may be; a checkpoint that others quantized is not measured there."""

# More than any store takes: what it really takes stands in the plan.
_ENOUGH_DISK_BYTES = 1 << 50
# More tokens/s of several changes together than of one of them, which make them worth their cost in quality.
_WORTH = 1.01
_FOLDER, _SPACE = "--nvme-path DIR", "--nvme-space SIZE"
_WIRES: dict[Wire, Quality] = {"int8": "near lossless", "int4": "lossy"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One change: flags as the user writes them or, for hardware, words."""

    flags: str
    constraints: Constraints
    machine: Machine
    quality: Quality = "exact"
    checkpoint: str = ""
    """The catalog's name of another checkpoint of the model; empty: the same one."""
    parts: tuple[str, ...] = ()
    """Of several changes together, the flags of each."""

    def then(self, other: Change) -> Change:
        """This change and `other`, which was made of this one's wish and machine."""
        worse = max((self.quality, other.quality), key=get_args(Quality).index)
        parts = (self.flags, other.flags)
        return replace(other, flags=" ".join(parts), quality=worse, parts=parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """A change, and the candidate that was planned with it."""

    change: Change
    candidate: Candidate

    @property
    def speed(self) -> str:
        """Tokens/s, with their unit; empty where the planner knows no speed of the engine."""
        rate = self.candidate.timing.tokens_per_second
        return (
            f"{f'{rate:,.0f}' if rate >= 100 else rate_text(rate)} tokens/s"
            if descriptor_of(self.candidate.choice.engine).is_timed
            else ""
        )

    @property
    def has_effect(self) -> bool:
        """Whether the plan uses what the change offers: a disk, or codes of keys and values."""
        choice, flags = self.candidate.choice, self.change.flags
        return bool(choice.nvme_blocks or "--nvme-" not in flags) and bool(
            choice.host_rows or "--kv-dtype" not in flags
        )

    @property
    def flags(self) -> str:
        """The flags to write, with the space that a disk needs."""
        store = total(self.candidate.terms, "disk") / 2**30
        flags = self.change.flags.replace(_SPACE, f"--nvme-space {ceil(store)}GiB")
        return f"{flags} ({store:.0f} GiB there)" if _FOLDER in flags and store else flags


def worthwhile(advice: Iterable[Advice]) -> tuple[Advice, ...]:
    """`advice` without changes together that are no faster than one of them alone."""
    found = tuple(advice)
    rates = {one.change.flags: one.candidate.timing.tokens_per_second for one in found}

    def alone(one: Advice) -> float:
        return max((rates.get(part, 0.0) for part in one.change.parts), default=0.0)

    return tuple(one for one in found if not one.change.parts or rates[one.change.flags] > _WORTH * alone(one))


def alternatives(
    constraints: Constraints, machine: Machine, anatomy: Anatomy, checkpoints: Mapping[str, str]
) -> Iterator[Change]:
    """Changes to a plan that fits: fewer bytes of weights, of keys and values, of both, quantized checkpoints, and a
    disk. `checkpoints` are the hub ids of the model's quantized checkpoints by their names in the catalog."""
    smaller = list(smaller_weights(constraints, machine, anatomy))
    yield from smaller
    cache = list(_smaller_cache(constraints, machine, anatomy))
    yield from cache
    for change in smaller[-1:]:
        yield from (change.then(more) for more in _smaller_cache(change.constraints, machine, anatomy))
    yield from _quantized(constraints, machine, anatomy, checkpoints)
    yield from _disk(constraints, machine)


def smaller_weights(constraints: Constraints, machine: Machine, anatomy: Anatomy) -> Iterator[Change]:
    """Packed weights, the least lossy first; none where they are packed already."""
    if (
        "wire" in descriptor_of(constraints.engine).options
        and constraints.wire == "model"
        and anatomy.quantized is None
    ):
        for wire, quality in _WIRES.items():
            coded = replace(constraints, wire=wire)
            yield Change(flags=f"--wire {wire}", constraints=coded, machine=machine, quality=quality)


def remedies(
    constraints: Constraints, machine: Machine, anatomy: Anatomy, checkpoints: Mapping[str, str]
) -> Iterator[Change]:
    """Single changes with which something may fit where nothing did, those that cost nothing first."""
    yield from _freed(constraints, machine, anatomy)
    yield from smaller_weights(constraints, machine, anatomy)
    yield from _quantized(constraints, machine, anatomy, checkpoints)
    yield from _disk(constraints, machine)


def remedies_together(constraints: Constraints, machine: Machine, anatomy: Anatomy) -> Iterator[Change]:
    """Changes for where a single one does not do: smaller weights with another one."""
    for change in smaller_weights(constraints, machine, anatomy):
        others = (*_freed(change.constraints, machine, anatomy), *_disk(change.constraints, machine))
        yield from (change.then(more) for more in others)


def more_memory(constraints: Constraints, machine: Machine, nearest: Rejection) -> Change:
    """All that `nearest` lacks."""
    missing = dict[MemoryPlace, int](
        {shortage.place: round(shortage.missing_gib * 2**30) + 1 for shortage in nearest.shortages}
    )
    gpus = tuple(replace(gpu, free_bytes=gpu.free_bytes + missing.get("gpu", 0)) for gpu in machine.gpus)
    available = machine.memory.available_bytes + missing.get("host", 0)
    space = None if constraints.nvme_space_bytes is None else constraints.nvme_space_bytes + missing.get("disk", 0)
    return Change(
        flags=nearest.wanted,
        constraints=replace(constraints, offload=nearest.offload, nvme_space_bytes=space),
        machine=replace(machine, gpus=gpus, memory=replace(machine.memory, available_bytes=available)),
    )


def _freed(constraints: Constraints, machine: Machine, anatomy: Anatomy) -> Iterator[Change]:
    """Settings that the user fixed, left to the planner instead."""
    if constraints.engine != default_engine():
        other = replace(constraints, engine=default_engine(), offload="auto", ranks_per_stream=1, host_share=0.0)
        yield Change(flags=f"--engine {default_engine()}", constraints=other, machine=machine)
        return
    if constraints.batch_size is not None:
        rows = replace(constraints, batch_size=None, micro_batch_rows=None)
        yield Change(flags="--batch-size auto", constraints=rows, machine=machine)
    if constraints.resident_blocks is not None:
        blocks = replace(constraints, resident_blocks=None)
        yield Change(flags="--resident-blocks auto", constraints=blocks, machine=machine)
    if constraints.embeddings != "auto" and anatomy.tables:
        tables = replace(constraints, embeddings="auto")
        yield Change(flags="--embeddings auto", constraints=tables, machine=machine)
    if constraints.offload != "auto":
        yield Change(flags="--offload auto", constraints=replace(constraints, offload="auto"), machine=machine)


def _quantized(
    constraints: Constraints, machine: Machine, anatomy: Anatomy, checkpoints: Mapping[str, str]
) -> Iterator[Change]:
    if descriptor_of(constraints.engine).runs_quantized and constraints.wire == "model" and anatomy.quantized is None:
        for name, hub_id in checkpoints.items():
            yield Change(
                flags=f"--model {hub_id}",
                constraints=constraints,
                machine=machine,
                quality="quality not measured",
                checkpoint=name,
            )


def _smaller_cache(constraints: Constraints, machine: Machine, anatomy: Anatomy) -> Iterator[Change]:
    if (
        constraints.host_share == "auto"
        and constraints.kv_dtype == "model"
        and anatomy.can_rest_on_host
        and machine.gpus
    ):
        coded = replace(constraints, kv_dtype="int8")
        yield Change(flags="--kv-dtype int8", constraints=coded, machine=machine, quality="near lossless")


def _disk(constraints: Constraints, machine: Machine) -> Iterator[Change]:
    if descriptor_of(constraints.engine).mixes_tiers and not machine.disks and constraints.offload in ("auto", "cpu"):
        with_disk, _ = override(machine, Rates(), nvme_space=_ENOUGH_DISK_BYTES)
        disk = _FOLDER if constraints.names_folders else _SPACE
        flags = disk if constraints.offload == "auto" else f"--offload auto {disk}"
        found = replace(constraints, offload="auto", nvme_space_bytes=_ENOUGH_DISK_BYTES)
        yield Change(flags=flags, constraints=found, machine=with_disk)
