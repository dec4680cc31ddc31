"""Divides memory that a GPU and its host have in common into one part for each, so that no byte is planned twice."""

from __future__ import annotations

from dataclasses import replace

from zeroinf.hardware.machine import Machine
from zeroinf.model.anatomy import Anatomy

# Of the host: a process with its libraries, a margin for the system, and what a load stages or a disk's ring holds: so
# many blocks, and what lies outside them.
_PROCESS_BYTES, _MARGIN_BYTES, _BLOCKS = 5 << 29, 1 << 30, 4
# A piece that transformers converts is there so often.
_CONVERTED = 3


def divided(machine: Machine, anatomy: Anatomy, request_bytes: int = 0) -> Machine:
    """The machine with what a GPU that shares the host's memory can take, and with the rest for the host: what layers
    are staged in, processes, and `request_bytes` of a job's requests. Weights of such a GPU gain nothing on the host.

    Other machines stay as they are.
    """
    if not any(gpu.is_unified for gpu in machine.gpus):
        return machine
    largest = max((block.nbytes for block in anatomy.blocks), default=0)
    outside = sum(tensor.nbytes for tensor in anatomy.outside)
    staged = _BLOCKS * largest + outside
    if anatomy.loads != "in place":
        staged += _CONVERTED * max(largest, outside)
    if anatomy.loads == "as a whole":
        staged += anatomy.weight_bytes
    host = len(machine.gpus) * _PROCESS_BYTES + _MARGIN_BYTES + staged + request_bytes
    host = min(host, machine.memory.available_bytes)
    share = (machine.memory.available_bytes - host) // len(machine.gpus)
    gpus = tuple(
        replace(gpu, free_bytes=min(gpu.free_bytes or share, share)) if gpu.is_unified else gpu for gpu in machine.gpus
    )
    return replace(machine, gpus=gpus, memory=replace(machine.memory, available_bytes=host))
