"""Formats measured rates for the terminal: a name and a value with its unit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from zeroinf.hardware.rates import Rates
from zeroinf.sizes import gib


def rate_rows(rates: Rates) -> Iterator[tuple[str, str]]:
    """Each rate that is known, from disk to GPU. One that was not measured says where it comes from."""
    for field, name, value in _rows(rates):
        origin = rates.origin(field)
        yield name, value if origin == "measured" else f"{value} ({origin})"


def _rows(rates: Rates) -> Iterator[tuple[str, str, str]]:
    """Field, name and value of each row."""
    for volume, gbps in (rates.disk_gbps or {}).items():
        by_requests = (rates.disk_gbps_by_requests or {}).get(volume)
        details = f"; by requests in flight: {_table(by_requests)}" if by_requests else ""
        yield "disk_gbps", f"disk {volume}", f"{gbps:.2f} GB/s{details}"
    for volume, reads in (rates.disk_reads_per_s or {}).items():
        yield "disk_reads_per_s", f"single pages of {volume}", f"{reads:,.0f} a second"
    if rates.host_copy_gbps is not None:
        yield "host_copy_gbps", "host memory copy", f"{rates.host_copy_gbps:.1f} GB/s"
    if rates.host_recopy_gbps is not None:
        yield "host_recopy_gbps", "copy to written memory", f"{rates.host_recopy_gbps:.1f} GB/s"
    if rates.host_read_gbps is not None:
        yield "host_read_gbps", "host memory read", f"{rates.host_read_gbps:.1f} GB/s"
    if rates.host_read_beside_link_gbps is not None:
        yield "host_read_beside_link_gbps", "read beside a link", f"{rates.host_read_beside_link_gbps:.1f} GB/s"
    if rates.link_beside_read_gbps is not None:
        yield "link_beside_read_gbps", "link beside reads", f"{rates.link_beside_read_gbps:.1f} GB/s"
    if rates.page_lock_gbps is not None:
        yield "page_lock_gbps", "page-locking", f"{rates.page_lock_gbps:.2f} GB/s"
    if rates.shared_copy_gbps is not None:
        yield "shared_copy_gbps", "copy to shared memory", f"{rates.shared_copy_gbps:.1f} GB/s"
    if rates.shared_page_lock_gbps is not None:
        yield "shared_page_lock_gbps", "page-locking shared", f"{rates.shared_page_lock_gbps:.2f} GB/s"
    if rates.link_gbps is not None:
        yield "link_gbps", "link of one GPU", f"{rates.link_gbps:.1f} GB/s"
    if rates.links_gbps is not None:
        yield "links_gbps", "links at once", f"GB/s by GPUs: {_table(rates.links_gbps)}"
    if rates.all_gather_gbps is not None:
        yield "all_gather_gbps", "all-gather", f"GB/s by GPUs: {_table(rates.all_gather_gbps)}"
    if rates.hbm_gbps is not None:
        yield "hbm_gbps", "GPU memory", f"{rates.hbm_gbps:,.0f} GB/s"
    for dtype, by_rows in (rates.matmul_tflops or {}).items():
        yield "matmul_tflops", f"matmul {dtype}", f"TFLOP/s by rows: {_table(by_rows)}"
    if rates.launch_s is not None:
        yield "launch_s", "kernel launch", f"{rates.launch_s * 1e6:.1f} us"
    if rates.model_launch_s is not None:
        yield "model_launch_s", "a model's kernel launch", f"{rates.model_launch_s * 1e6:.1f} us"
    if rates.triton_launch_s is not None:
        yield "triton_launch_s", "a Triton kernel's launch", f"{rates.triton_launch_s * 1e6:.1f} us"
    if rates.context_bytes is not None:
        yield "context_bytes", "CUDA context", gib(rates.context_bytes)
    if rates.process_bytes is not None:
        yield "process_bytes", "process on the host", gib(rates.process_bytes)
    if rates.workspace_bytes is not None:
        yield "workspace_bytes", "matmul workspace", gib(rates.workspace_bytes)
    if rates.nccl_bytes is not None:
        sizes = ", ".join(f"{n}: {gib(size)}" for n, size in rates.nccl_bytes.items())
        yield "nccl_bytes", "NCCL", f"by GPUs: {sizes}"


def _table(rates: Mapping[int, float]) -> str:
    return ", ".join(f"{number}: {rate:.3g}" for number, rate in rates.items())
