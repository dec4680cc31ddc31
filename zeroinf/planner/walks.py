"""Counts what blocks take on each tier, which of them pass through slots, and how few can be left to NVMe.

Input: an anatomy and a choice of settings. Output: for the decoder and an encoder, the bytes of their pieces by where
`zeroinf.planner.tiers` places each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from zeroinf.model.anatomy import Anatomy
from zeroinf.planner.choice import Choice, Fetch
from zeroinf.planner.memory import SLOTS, units, with_layers
from zeroinf.planner.tiers import Tier, tiers, unit_tiers
from zeroinf.planner.wire import Wire


@dataclass(frozen=True, kw_only=True, slots=True)
class Lane:
    """The pieces of one kind, in bytes: whole blocks, or what blocks have beside their experts, or parts of experts.
    Those that do not stay on the GPU pass through slots of the kind's own."""

    resident: tuple[int, ...]
    """Each that stays on the GPU."""
    streamed: int
    """The number of those that pass through slots."""
    largest: int
    """Of those that pass through slots; 0 where none does."""
    largest_read: int
    """Of those on NVMe; 0 where none is there."""
    host_bytes: int
    nvme_bytes: int

    @property
    def streamed_bytes(self) -> int:
        return self.host_bytes + self.nvme_bytes

    def slots(self, fetch: Fetch) -> int:
        """The number of slots."""
        return min(SLOTS[fetch], self.streamed)


@dataclass(frozen=True, slots=True)
class Walk:
    """The blocks that are visited together: one kind of pieces or, where experts come in parts, two."""

    lanes: tuple[Lane, ...]

    @property
    def nbytes(self) -> int:
        return self.resident_bytes + self.streamed_bytes

    @property
    def resident_bytes(self) -> int:
        return sum(sum(lane.resident) for lane in self.lanes)

    @property
    def streamed_bytes(self) -> int:
        return sum(lane.streamed_bytes for lane in self.lanes)

    @property
    def host_bytes(self) -> int:
        return sum(lane.host_bytes for lane in self.lanes)

    @property
    def nvme_bytes(self) -> int:
        return sum(lane.nvme_bytes for lane in self.lanes)


def walks(anatomy: Anatomy, choice: Choice) -> tuple[Walk, ...]:
    """The decoder's blocks, which every pass visits, and the encoder's, if there is one, which new prompts visit."""
    return _walks(
        with_layers(anatomy, choice.embeddings),
        choice.wire,
        choice.expert_parts,
        choice.resident_blocks,
        choice.nvme_blocks,
        choice.host_units,
    )


@lru_cache(maxsize=4096)
def _walks(anatomy: Anatomy, wire: Wire, parts: int, resident: int, nvme: int, host_units: int) -> tuple[Walk, ...]:
    every, first = units(anatomy, wire, parts), anatomy.encoder_blocks
    of_blocks = tiers(tuple(map(sum, every)), resident, nvme, encoder=first)
    where = unit_tiers(of_blocks, tuple(map(len, every)), host_units)
    stacks = (slice(first, None), slice(first)) if first else (slice(None),)
    return tuple(Walk(tuple(_lanes(every[stack], where[stack]))) for stack in stacks)


def _lanes(every: Sequence[Sequence[int]], where: Sequence[Sequence[Tier]]) -> Iterator[Lane]:
    """The pieces of some blocks, of which the first ones are of one kind, and the others of another."""
    for own in (slice(1), slice(1, None)):
        found: dict[Tier, list[int]] = {"gpu": [], "host": [], "nvme": []}
        for sizes, places in zip(every, where, strict=True):
            for nbytes, tier in zip(sizes[own], places[own], strict=True):
                found[tier].append(nbytes)
        streamed = [*found["host"], *found["nvme"]]
        if found["gpu"] or streamed:
            yield Lane(
                resident=tuple(found["gpu"]),
                streamed=len(streamed),
                largest=max(streamed, default=0),
                largest_read=max(found["nvme"], default=0),
                host_bytes=sum(found["host"]),
                nvme_bytes=sum(found["nvme"]),
            )


def device_bytes(anatomy: Anatomy, choice: Choice) -> tuple[int, ...]:
    """Bytes of blocks that stay on the GPU and of slots, by the number of blocks that stay."""
    return _device_bytes(with_layers(anatomy, choice.embeddings), choice.wire, choice.expert_parts, choice.fetch)


@lru_cache(maxsize=64)
def _device_bytes(anatomy: Anatomy, wire: Wire, parts: int, fetch: Fetch) -> tuple[int, ...]:
    return tuple(
        sum(sum(lane.resident) + lane.slots(fetch) * lane.largest for walk in visited for lane in walk.lanes)
        for visited in (_walks(anatomy, wire, parts, residents, 0, 0) for residents in range(len(anatomy.blocks) + 1))
    )


def with_pieces_on_disk(anatomy: Anatomy, choice: Choice, left_bytes: Callable[[Choice], int]) -> Choice:
    """`choice`, whose blocks on NVMe are wholly there, with the fewest pieces on NVMe that fit; itself if none does.
    `left_bytes` says what a choice leaves of host memory, below 0 what it lacks.

    The others rest in host memory. Fewer pieces there take more of it, but for the buffers that they are read into:
    these are as large as the largest piece, so pieces of each size are looked at by themselves.
    """
    layers = with_layers(anatomy, choice.embeddings)
    every = units(layers, choice.wire, choice.expert_parts)
    where = tiers(tuple(map(sum, every)), choice.resident_blocks, choice.nvme_blocks, encoder=layers.encoder_blocks)
    on_disk = [own for own, tier in zip(every, where, strict=True) if tier == "nvme"]
    first = where[: layers.encoder_blocks].count("nvme")

    def with_some(count: int) -> Choice:
        if choice.expert_parts == 1:
            return replace(choice, nvme_blocks=count)
        return replace(choice, host_units=sum(map(len, on_disk)) - count)

    if choice.expert_parts == 1:  # in the order in which `tiers` leaves blocks to NVMe
        stacks = on_disk[:first], on_disk[first:]
        alike = [(stack.count(own), sum(own)) for stack in stacks for own in sorted(set(stack))]
    else:
        experts = [size for own in on_disk for size in own[1:]]
        alike = [(len(experts), max(experts, default=0)), (len(on_disk), max((own[0] for own in on_disk), default=0))]
    miss = end = 0
    for count, nbytes in alike:
        miss, end = end, end + count
        if count and (left := left_bytes(with_some(end))) >= 0:
            fit, guess, guesses = end, end - left // nbytes, 2  # the second shows that the first was right, as a rule
            while fit - miss > 1:
                tried, guesses = guess if guesses and miss < guess < fit else (fit + miss) // 2, max(0, guesses - 1)
                is_fit = left_bytes(with_some(tried)) >= 0
                fit, miss, guess = (tried, miss, tried - 1) if is_fit else (fit, tried, tried + 1)
            return with_some(fit)
    return choice
