"""Assigns each block to a tier, gpu, host or nvme, and parts of blocks on NVMe to host memory as far as they fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypeVar

_Item = TypeVar("_Item")

Tier = Literal["gpu", "host", "nvme"]


def tiers(sizes: Sequence[int], resident: int, nvme: int, *, encoder: int = 0) -> tuple[Tier, ...]:
    """The tier of each block, in order, by the bytes of each: the `resident` largest on the GPU, the `nvme` smallest of
    the others on NVMe, the rest in host memory.

    So one more block on the GPU, or one less on NVMe, always moves fewer bytes, and slots and buffers are no larger
    than what is left for them. Of blocks of one size, residents are spread evenly over the pass, so that the link has
    as much time before each block that streams, and blocks on NVMe are spread evenly among the others. The first
    `encoder` blocks work once for a prompt, not once for a token: the others are the first to stay on the GPU and the
    last to rest on NVMe. Raises ValueError for counts that are negative or more than there are blocks.
    """
    blocks = len(sizes)
    if resident < 0 or nvme < 0 or resident + nvme > blocks:
        raise ValueError(f"{resident} resident blocks and {nvme} on NVMe, of {blocks}")
    found: list[Tier] = ["host"] * blocks
    parts = range(encoder, blocks), range(encoder)
    for part, (gpu, disk) in zip(parts, _shares(blocks, resident, nvme, encoder), strict=True):
        for index in _chosen(part, sizes, gpu, largest=True):
            found[index] = "gpu"
        for index in _chosen([index for index in part if found[index] == "host"], sizes, disk, largest=False):
            found[index] = "nvme"
    return tuple(found)


def _shares(blocks: int, resident: int, nvme: int, encoder: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Share out resident blocks and blocks on NVMe: those of the decoder, and those of the encoder."""
    decoder_resident = min(resident, blocks - encoder)
    encoder_resident = resident - decoder_resident
    encoder_nvme = min(nvme, encoder - encoder_resident)
    return (decoder_resident, nvme - encoder_nvme), (encoder_resident, encoder_nvme)


def unit_tiers(blocks: Sequence[Tier], units: Sequence[int], host_units: int) -> tuple[tuple[Tier, ...], ...]:
    """The tier of everything that moves as one piece, of each of `blocks`, of which there are so many `units`: first
    what a block has beside its experts, then parts of these.

    Of blocks on NVMe `host_units` rest in host memory: first what is beside experts, which every pass needs, then parts
    of these, spread evenly, so that the disk has as much time for each that is on it. Raises ValueError for more than
    there are.
    """
    found: list[list[Tier]] = [[tier] * count for tier, count in zip(blocks, units, strict=True)]
    on_disk = [index for index, tier in enumerate(blocks) if tier == "nvme"]
    dense = [(index, 0) for index in on_disk]
    experts = [(index, unit) for index in on_disk for unit in range(1, units[index])]
    if not 0 <= host_units <= len(dense) + len(experts):
        raise ValueError(f"{host_units} parts of blocks on NVMe in host memory, of {len(dense) + len(experts)}")
    first = min(host_units, len(dense))
    for index, unit in (*_spread(dense, first), *_spread(experts, host_units - first)):
        found[index][unit] = "host"
    return tuple(map(tuple, found))


def _chosen(items: Sequence[int], sizes: Sequence[int], count: int, *, largest: bool) -> Iterator[int]:
    """`count` of `items`, the largest or the smallest, and of those of one size some that are spread evenly."""
    for size in sorted({sizes[item] for item in items}, reverse=largest):
        alike = [item for item in items if sizes[item] == size]
        yield from _spread(alike, min(count, len(alike)))
        count -= min(count, len(alike))


def _spread(items: Sequence[_Item], count: int) -> list[_Item]:
    """`count` of `items`, each in the middle of its equal share of them."""
    return [items[(2 * turn + 1) * len(items) // (2 * count)] for turn in range(count)]
