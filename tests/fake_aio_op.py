"""A machine on which DeepSpeed's NVMe op works: tests take something away from it."""

from __future__ import annotations

from pathlib import Path

from zeroinf.hardware.aio_op import AioOp

WORKING = AioOp(
    folder=Path("ext/async_io"),
    built=True,
    prebuilt=False,
    lock=None,
    lock_is_stale=False,
    header=Path("libaio.h"),
    library=Path("libaio.so"),
    compiler=Path("c++"),
    ninja=Path("ninja"),
    with_cuda=True,
    nvcc=Path("nvcc"),
    unreadable_architectures=(),
)
