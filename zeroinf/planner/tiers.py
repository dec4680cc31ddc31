"""Which tier each block rests on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Tier = Literal["gpu", "host", "nvme"]


def tiers(blocks: int, resident: int, nvme: int) -> tuple[Tier, ...]:
    """The tier of each of `blocks` blocks, in order: `resident` on the GPU, `nvme` on NVMe, the rest in host memory.

    Residents are spread evenly over the pass, so that the link has as much time before each block that streams; blocks
    on NVMe are spread evenly among those. Raises ValueError for counts that are negative or more than there are blocks.
    """
    if resident < 0 or nvme < 0 or resident + nvme > blocks:
        raise ValueError(f"{resident} resident blocks and {nvme} on NVMe, of {blocks}")
    found: list[Tier] = ["host"] * blocks
    for index in _spread(range(blocks), resident):
        found[index] = "gpu"
    for index in _spread([index for index in range(blocks) if found[index] == "host"], nvme):
        found[index] = "nvme"
    return tuple(found)


def _spread(items: Sequence[int], count: int) -> list[int]:
    """`count` of `items`, each in the middle of its equal share of them."""
    return [items[(2 * turn + 1) * len(items) // (2 * count)] for turn in range(count)]
