"""Small host-to-device copies that bypass the copy queue, which weights in flight may fill for tens of milliseconds."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from zeroinf.compat.host_arrays import mapped

_CODES = {torch.int64: "q", torch.float32: "f"}
"""Of `array`, which takes numbers out of Python's objects several times faster than torch."""

_unread: deque[tuple[Any, torch.Tensor]] = deque()
"""Page-locked memory that a GPU has yet to read, in order, each with the event after which it has."""


def to_device(
    values: Sequence[Any] | np.ndarray, device: torch.device, dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    """`values` as a tensor of one dimension, without waiting for the work that the device has before it.

    `dtype` is int64 or float32; an array has it already.

    A GPU reads them by a kernel. A copy would stand in the queue of its one engine for copies to the device, behind all
    blocks that there are slots for: three blocks of 0.6 GB kept each pass waiting for 34 ms on an H200.
    """
    if not len(values):
        return torch.empty(0, dtype=dtype, device=device)
    if isinstance(values, np.ndarray):
        host = torch.from_numpy(values)
    else:
        host = torch.frombuffer(array(_CODES[dtype], values), dtype=dtype)
    if device.type != "cuda":
        return host.to(device)
    pinned = host.pin_memory()
    moved = mapped(pinned, device) + 0
    while _unread and _unread[0][0].query():
        _unread.popleft()
    read = torch.cuda.Event()  # type: ignore[no-untyped-call]
    read.record(torch.cuda.current_stream(device))
    _unread.append((read, pinned))
    return moved
