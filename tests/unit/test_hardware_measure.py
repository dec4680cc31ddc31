"""Measuring, as far as it goes without a GPU."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zeroinf.errors import EnvironmentProblem
from zeroinf.hardware.disk import read_disk
from zeroinf.hardware.machine import Gpu
from zeroinf.hardware.measure import all_rates as measure_module
from zeroinf.hardware.measure import children
from zeroinf.hardware.measure.all_rates import gpu_counts, measure_machine
from zeroinf.hardware.measure.children import run_children
from zeroinf.hardware.measure.disk_rate import REQUESTS_IN_FLIGHT, measure_disk, measure_page_reads
from zeroinf.hardware.measure.footprint import _multiply, _use
from zeroinf.hardware.measure.gpu_rates import kernels_of, measure_model_launch
from zeroinf.hardware.measure.host_copy_rate import measure_host_copy
from zeroinf.hardware.measure.host_read_rate import measure_host_read
from zeroinf.hardware.snapshot import read_machine

GPU = Gpu(
    index=0, name="Fake", total_bytes=1 << 34, free_bytes=1 << 34, other_bytes=0, pcie_generation=4, pcie_width=16,
    capability=(8, 9),
)  # fmt: skip


def small_disk(folder: Path) -> dict[int, float]:
    return measure_disk(folder, file_bytes=16 << 20, read_s=0.01)


@pytest.fixture
def direct_folder(tmp_path: Path) -> Path:
    if not read_disk(tmp_path).o_direct:
        pytest.skip("the temporary folder has no O_DIRECT")
    return tmp_path


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules child processes can run."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    return tmp_path


def test_disk_is_read_at_every_number_of_requests_and_left_empty(direct_folder: Path) -> None:
    rates = small_disk(direct_folder)
    assert list(rates) == list(REQUESTS_IN_FLIGHT)
    assert all(gbps > 0 for gbps in rates.values())
    assert list(direct_folder.iterdir()) == []


@pytest.mark.parametrize(("free_bytes", "limit_s"), [(1 << 40, 0.0), (20 << 20, 10.0)], ids=["slow", "nearly full"])
def test_slow_or_nearly_full_disk_gets_a_smaller_file(
    free_bytes: int, limit_s: float, direct_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free_bytes))
    written: list[int] = []
    real_write = os.pwrite

    def write(descriptor: int, data: bytes, at: int) -> int:
        written.append(at)
        return real_write(descriptor, data, at)

    monkeypatch.setattr(os, "pwrite", write)
    measure_disk(direct_folder, write_limit_s=limit_s, read_s=0.01)
    assert len(written) == 1


@pytest.mark.parametrize("shared", [False, True])
def test_host_memory_copies_at_some_rate(shared: bool) -> None:
    assert all(rate > 0 for rate in measure_host_copy(shared=shared, nbytes=8 << 20))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_every_kernel_of_the_footprint_runs_on_numbers_that_stay_finite(dtype: torch.dtype) -> None:
    with torch.inference_mode():
        assert _use(torch.device("cpu"), dtype).isfinite().all()
        _multiply(torch.device("cpu"), dtype, width=8)


@given(st.integers(1, 64))
def test_gpu_counts_double_up_to_all(number: int) -> None:
    counts = gpu_counts(number)
    assert counts[0] == 1
    assert counts[-1] == number
    assert counts == sorted(set(counts))
    assert all(n & (n - 1) == 0 for n in counts[:-1])
    assert all(more <= 2 * less for less, more in itertools.pairwise(counts))


def small_pages(folder: Path) -> float:
    return measure_page_reads(folder, file_bytes=16 << 20, most_s=0.1)


def test_single_pages_are_read_at_some_rate_and_leave_nothing(tmp_path: Path) -> None:
    assert small_pages(tmp_path) > 0
    assert list(tmp_path.iterdir()) == []


def test_machine_without_gpus_measures_disk_and_host_and_a_failure_stops_nothing(
    direct_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure_module, "measure_disk", small_disk)
    monkeypatch.setattr(measure_module, "measure_page_reads", small_pages)
    monkeypatch.setattr(measure_module, "measure_host_copy", lambda: measure_host_copy(nbytes=8 << 20))
    monkeypatch.setattr(measure_module, "measure_host_read", lambda: measure_host_read(nbytes=8 << 20))
    absent = direct_folder / "absent"
    machine = replace(read_machine([absent, direct_folder]), gpus=())
    said: list[str] = []
    rates = measure_machine(machine, said.append)
    host = {"host_copy_gbps", "host_recopy_gbps", "host_read_gbps"}
    assert set(rates.known) == {*host, "disk_gbps", "disk_gbps_by_requests", "disk_reads_per_s"}
    assert set(rates.origins.values()) == {"measured"}
    assert rates.of_disk(machine.disks[1]) == max((rates.disk_gbps or {}).values())
    assert any(line.startswith(f"not measured: disk of {absent}: ") for line in said)


def test_gpus_that_torch_cannot_use_are_left_out_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(measure_module, "measure_host_copy", lambda: (10.0, 20.0))
    monkeypatch.setattr(measure_module, "measure_host_read", lambda: 30.0)
    said: list[str] = []
    rates = measure_machine(replace(read_machine(), gpus=(GPU,)), said.append)
    assert rates.known == {"host_copy_gbps": 10.0, "host_recopy_gbps": 20.0, "host_read_gbps": 30.0}
    assert said[0] == "not measured: GPUs: this torch cannot use them"


def test_launches_are_measured_with_as_few_threads_as_runs_have(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any, **more: Any) -> Any:
        raise RuntimeError("no GPU")

    found: dict[str, int] = {}
    for name in (one for one in vars(measure_module) if one.startswith("measure_") and one != "measure_machine"):
        monkeypatch.setattr(measure_module, name, fails)
    for name in ("measure_launch", "measure_model_launch", "measure_triton_launch"):
        monkeypatch.setattr(
            measure_module, name, lambda name=name: found.setdefault(name, torch.get_num_threads()) * 1e-6
        )
    monkeypatch.setattr(measure_module, "_dtypes", fails)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        rates = measure_machine(replace(read_machine(), gpus=(GPU,), disks=()), lambda line: None)
        assert torch.get_num_threads() == 8
    finally:
        torch.set_num_threads(before)
    assert set(found.values()) == {2} and len(found) == 3
    assert rates.launch_s == rates.model_launch_s == rates.triton_launch_s == 2e-6


def test_children_answer_in_order(modules: Path) -> None:
    (modules / "answering.py").write_text(
        "import json, sys\nprint('noise of a library')\nprint(json.dumps({'told': sys.argv[1:]}))\n"
    )
    assert run_children("answering", [["a"], ["b", "c"]]) == [{"told": ["a"]}, {"told": ["b", "c"]}]


def test_child_that_fails_is_an_environment_problem_with_its_last_words(modules: Path) -> None:
    (modules / "failing.py").write_text("raise SystemExit('no kernel image is available')\n")
    with pytest.raises(EnvironmentProblem, match="ended with 1: no kernel image is available"):
        run_children("failing", [[]])


def test_children_that_hang_are_ended(modules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (modules / "hanging.py").write_text("import time\ntime.sleep(600)\n")
    started: list[subprocess.Popen[str]] = []
    real_popen = subprocess.Popen

    def popen(*arguments: Any, **settings: Any) -> subprocess.Popen[str]:
        started.append(real_popen(*arguments, **settings))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(children, "_PATIENCE_S", 0.1)
    with pytest.raises(EnvironmentProblem, match=r"did not end within 0\.1 s"):
        run_children("hanging", [["first"], ["second"]])
    assert [child.returncode for child in started] == [-signal.SIGKILL] * 2


def test_a_kernel_is_counted_for_each_operator_that_computes() -> None:
    weight, hidden = torch.ones(4, 4), torch.ones(2, 3, 4)

    def work() -> torch.Tensor:
        with torch.no_grad():
            product = torch.nn.functional.linear(hidden, weight)  # transposed, flattened, multiplied, a view again
            return product.transpose(0, 1)[:, 1:].to(torch.float16) + 1

    assert kernels_of(work) == 3


def test_a_models_kernels_take_their_launches_and_its_python() -> None:
    assert 1e-6 < measure_model_launch("cpu") < 1e-2
