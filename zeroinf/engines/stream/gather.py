"""Embeddings in host memory or on a disk: the CPU gathers the rows that a forward reads, and the embedding runs on
these alone.

Input: `nn.Embedding` modules with their matrices in host memory, or functions that read rows. Each call of one copies
its rows into a small buffer on the device and lets the unmodified module look up these, in the order in which they were
asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import Embedding, Parameter

from zeroinf.compat.host_arrays import mapped
from zeroinf.compat.modules import own_parameters
from zeroinf.engines.stream.host_memory import HostMemory
from zeroinf.model.anatomy import Table
from zeroinf.planner.memory import INDEX_BYTES, gathered_bytes, round_up

FindRows = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Of numbers of rows of a matrix (int64): rows (some of the matrix, or all) in host memory, and where each of the
numbers lies among them."""


class Gatherer:
    """The buffers that rows of tables pass through, in host memory and on the device, with room for those that
    `tokens` tokens of one forward read of any one table.

    Calls follow each other on the stream that computes, so all tables share the buffers: a call begins with a copy of
    its numbers to the host, which waits until nothing before it needs them any more.
    """

    def __init__(self, tables: Sequence[Table], tokens: int, device: torch.device, *, pin: bool) -> None:
        rows, numbers = gathered_bytes(tables, tokens)
        self._device, self._pin = device, pin
        self._make(rows, numbers)

    def _make(self, row_bytes: int, number_bytes: int) -> None:
        self._host = HostMemory(max(row_bytes, INDEX_BYTES), pin=self._pin)
        self._rows = torch.empty(row_bytes, dtype=torch.uint8, device=self._device)
        self._numbers = torch.arange(number_bytes // INDEX_BYTES, device=self._device)

    def attach(self, module: Embedding, find: FindRows) -> None:
        """Let `module` read the rows that `find` finds, in the dtype that its weight has."""
        own = own_parameters(module)
        shape, dtype = module.weight.shape, module.weight.dtype
        # Models ask where weights are, of what dtype and shape: one row answers for all of them.
        one = torch.zeros(1, shape[1], dtype=dtype, device=self._device)
        absent = own["weight"] = Parameter(one.expand(shape), requires_grad=False)
        module.padding_idx = None  # of no use but in training, and rows have other numbers here

        def before(module: Embedding, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            (ids,) = args
            own["weight"] = Parameter(self._gather(find, ids, dtype), requires_grad=False)
            return (self._numbers[: ids.numel()].view(ids.shape),)

        def after(module: Embedding, args: Any, output: Any) -> None:
            own["weight"] = absent

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after, always_call=True)

    def _gather(self, find: FindRows, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The rows `ids` that `find` finds, on the device: (as many as `ids`, width)."""
        rows, wanted = find(ids.reshape(-1).cpu())
        shape = wanted.numel(), rows.shape[1]
        nbytes = wanted.numel() * rows.shape[1] * dtype.itemsize
        if nbytes > self._rows.numel() or wanted.numel() > self._numbers.numel():
            self.close()
            most = max(wanted.numel(), self._numbers.numel())
            self._make(round_up(max(nbytes, self._rows.numel()), INDEX_BYTES), INDEX_BYTES * most)
        gathered = self._host.bytes[:nbytes].view(dtype).view(shape)
        if rows.dtype == dtype:
            torch.index_select(rows, 0, wanted, out=gathered)
        else:
            gathered.copy_(rows.to(dtype)[wanted])
        copy_to_device(self._host.bytes, self._rows, nbytes)
        return self._rows[:nbytes].view(dtype).view(shape)

    @property
    def pinned_bytes(self) -> int:
        return self._host.pinned_bytes

    def close(self) -> None:
        """Unlock the buffer in host memory. No copy from it may be under way."""
        self._host.close()


def copy_to_device(pinned: torch.Tensor, target: torch.Tensor, nbytes: int) -> None:
    """Copy the first `nbytes` of `pinned` (uint8, of whole words of 8 bytes) to the start of `target` (uint8).

    On a GPU a kernel reads them where they are page-locked: a copy would stand behind weights in the copy queue. They
    may be overwritten once all that was enqueued up to here is done.
    """
    if target.device.type != "cuda" or not pinned.is_pinned():
        target[:nbytes].copy_(pinned[:nbytes])
        return
    words = -(-nbytes // 8)
    source = mapped(pinned[: 8 * words].view(torch.int64), target.device)
    torch.add(source, 0, out=target[: 8 * words].view(torch.int64))
