"""A long run measures its GPU and its host memory before it is planned, where nobody has done so yet."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from ctypes import CDLL
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_machines import GIB, machine_of
from simulating import shared_simulations

from zeroinf.cli.plan_view import print_plan
from zeroinf.errors import EnvironmentProblem
from zeroinf.hardware import host_library
from zeroinf.hardware.machine import Gpu
from zeroinf.hardware.measure.host_read_rate import BesideLink
from zeroinf.hardware.measure.link_traffic import busy_link
from zeroinf.hardware.profile import read_profile
from zeroinf.hardware.rates import Rates
from zeroinf.hardware.snapshot import read_machine
from zeroinf.model.catalog import catalog_config
from zeroinf.model.inspect import read_anatomy
from zeroinf.options import measured_plan
from zeroinf.options.measured_plan import plan_with_measured_rates
from zeroinf.planner.constraints import Constraints
from zeroinf.planner.workload import Lengths
from zeroinf.simulation.make_plan import PlanInput, make_plan

LONG, SHORT = 100_000, 192
GPU_RATES: dict[str, Any] = {"matmul_tflops": {"bfloat16": {8192: 100.0}}, "hbm_gbps": 900.0, "launch_s": 8e-6}


@pytest.fixture(scope="module", autouse=True)
def _models_are_simulated_once() -> Iterator[None]:
    with shared_simulations():
        yield


@pytest.fixture(scope="module")
def asked() -> PlanInput:
    """A model whose steps wait for its keys and values to come over the link."""
    config = catalog_config("opt-1.3b")
    return PlanInput(
        config=config,
        anatomy=read_anatomy(config, dtype="bfloat16"),
        machine=machine_of(gpus=1, gpu_bytes=2 * GIB, host_bytes=100 * GIB),
        rates=Rates.of("given", **GPU_RATES),
        constraints=Constraints(offload="cpu", batch_size=192, host_share=1.0, requests=LONG),
        lengths=Lengths(prompt_tokens=512, new_tokens=32),
        device="cuda",
    )


class Measured:
    """What a run measures, and how often."""

    def __init__(self) -> None:
        self.times = 0
        self.said: list[str] = []
        self.link_fails = self.gpu_fails = False
        self.gpus = 0

    def reads(self) -> float:
        self.times += 1
        return 80.0

    def beside(self, device: int) -> BesideLink:
        if self.link_fails:
            raise EnvironmentProblem("no driver")
        return BesideLink(70.0, 21.0, 24.0)

    def gpu(self, gpu: Gpu, dtype: str) -> dict[str, Any]:
        self.gpus += 1
        if self.gpu_fails:
            raise EnvironmentProblem("a measuring process ended with 1: no memory")
        assert dtype == "bfloat16"
        return GPU_RATES

    def plan(self, asked: PlanInput, **wished: Any) -> Any:
        constraints = replace(asked.constraints, **wished)
        return plan_with_measured_rates(replace(asked, constraints=constraints), self.said.append)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Measured:
    found = Measured()
    monkeypatch.setenv("ZEROINF_CACHE", str(tmp_path))
    monkeypatch.setattr(measured_plan, "measure_host_read", found.reads)
    monkeypatch.setattr(measured_plan, "measure_read_beside_link", found.beside)
    monkeypatch.setattr(measured_plan, "measure_briefly", found.gpu)
    monkeypatch.setattr(measured_plan, "host_library", lambda: None)
    return found


def test_a_long_job_that_waits_for_the_link_is_planned_with_what_was_measured(
    asked: PlanInput, measured: Measured
) -> None:
    unmeasured = make_plan(asked)
    assert unmeasured.could_attend
    plan = measured.plan(asked)
    assert (plan.kv_attention, measured.times) == ("cpu", 1)
    assert plan.timing.tokens_per_second > 1.5 * unmeasured.decision.tokens_per_second
    assert measured.said == [
        "measured for the plan: host memory is read at 80 GB/s",
        "beside the link at 70 GB/s, and the link gives 21 then",
    ]
    kept = read_profile(read_machine())
    assert (kept.host_read_gbps, kept.host_read_beside_link_gbps, kept.link_gbps) == (80.0, 70.0, 24.0)
    assert kept.link_beside_read_gbps == 21.0
    assert kept.origin("host_read_gbps") == "measured"
    known = replace(asked, rates=asked.rates.updated(kept))
    assert measured.plan(known) == plan
    assert (measured.times, measured.gpus) == (1, 0), "what is known is not measured again"
    assert not make_plan(known).could_attend


def test_a_long_job_is_planned_with_what_its_gpu_was_measured_to_do(asked: PlanInput, measured: Measured) -> None:
    unknown = replace(asked, rates=Rates())
    assert (
        measured.plan(unknown, kv_attention="gpu", requests=SHORT)
        == make_plan(replace(unknown, constraints=replace(asked.constraints, kv_attention="gpu", requests=SHORT))).plan
    )
    assert measured.gpus == 0, "a short job is over before"
    plan = measured.plan(unknown, kv_attention="gpu", requests=None)
    assert (measured.gpus, measured.times) == (1, 0)
    kept = read_profile(read_machine())
    assert kept.known == GPU_RATES
    constraints = replace(asked.constraints, kv_attention="gpu", requests=None)
    assert plan == make_plan(replace(asked, rates=kept, constraints=constraints)).plan
    measured.gpu_fails = True
    measured.plan(unknown, kv_attention="gpu")
    assert measured.said[-1].startswith("the GPU could not be measured, so the plan assumes rates: a measuring process")


def test_a_plan_for_this_machine_says_that_a_measurement_would_help(
    asked: PlanInput, capsys: pytest.CaptureFixture[str]
) -> None:
    print_plan(asked, make_plan(asked), explain=False)
    assert "attention on the CPU was not compared" not in capsys.readouterr().out, "of another machine nothing is known"
    here = replace(asked, machine=replace(asked.machine, gpus=tuple(replace(g, uuid="G") for g in asked.machine.gpus)))
    print_plan(here, make_plan(here), explain=False)
    assert "attention on the CPU was not compared" in capsys.readouterr().out
    forced = replace(here, constraints=replace(here.constraints, kv_attention="cpu", host_share="auto"))
    assert "host_read_gbps" in make_plan(forced).speeds.projected, "whether or not rows rest in host memory then"


def test_who_asks_for_it_has_it_measured_for_a_short_job_too(asked: PlanInput, measured: Measured) -> None:
    assert measured.plan(asked, requests=SHORT).kv_attention == "gpu"
    assert measured.times == 0
    assert measured.plan(asked, requests=SHORT, kv_attention="cpu").kv_attention == "cpu"
    assert measured.times == 1


@pytest.mark.parametrize("wished", [{"kv_attention": "gpu"}, {"no_host_kernel": "no compiler"}, {"host_share": 0.0}])
def test_nothing_is_measured_where_the_cpu_would_not_attend(
    wished: dict[str, Any], asked: PlanInput, measured: Measured
) -> None:
    measured.plan(asked, batch_size=2, **wished)
    assert measured.times == 0


def test_a_measurement_that_fails_is_told_and_the_run_is_planned(
    asked: PlanInput, measured: Measured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured.link_fails = True
    (tmp_path / "file").touch()
    monkeypatch.setenv("ZEROINF_CACHE", str(tmp_path / "file"))
    assert measured.plan(asked).kv_attention == "cpu"
    reads, beside, kept = measured.said
    assert beside.startswith("reads of host memory beside the link could not be measured")
    assert reads.endswith("read at 80 GB/s")
    assert kept.startswith("the measured rates serve this run only: cannot keep")


DRIVER = """
#include <stdlib.h>
static int contexts, copies, failing;
int made(void) { return contexts; }
void fail(int code) { failing = code; }
int cuInit(unsigned flags) { return 0; }
int cuDeviceGet(int *device, int number) { *device = number; return number ? 101 : 0; }
int cuCtxCreate_v2(void **context, unsigned flags, int device) { *context = malloc(1); ++contexts; return 0; }
int cuCtxDestroy_v2(void *context) { free(context); --contexts; return 0; }
int cuMemAllocHost_v2(void **memory, size_t size) { static char held[256 << 20]; *memory = held; return 0; }
int cuMemAlloc_v2(void **memory, size_t size) { *memory = (void *)8; return 0; }
int cuMemcpyHtoDAsync_v2(void *to, void *from, size_t size, void *stream) { return failing; }
int cuCtxSynchronize(void) { return 0; }
"""


def test_copies_fill_the_link_in_a_context_of_their_own(tmp_path: Path) -> None:
    compiler = host_library._compiler()
    file = tmp_path / "driver.so"
    subprocess.run([*compiler, "-xc", "-shared", "-fPIC", "-o", str(file), "-"], input=DRIVER, text=True, check=True)
    driver = CDLL(str(file))
    with busy_link(0, str(file)) as traffic:
        assert traffic.alone_gbps > 0
        assert driver.made() == 1
    assert driver.made() == 0
    with pytest.raises(EnvironmentProblem, match="cuDeviceGet gives CUDA error 101"), busy_link(1, str(file)):
        pass
    with pytest.raises(EnvironmentProblem, match="cuMemcpyHtoDAsync_v2 gives CUDA error 700"):  # noqa: SIM117
        with busy_link(0, str(file)):
            driver.fail(700)
            while driver.made():  # until a copy has failed
                time.sleep(0.001)
    assert driver.made() == 0
    with pytest.raises(EnvironmentProblem, match="cannot be loaded"), busy_link(0, str(tmp_path / "absent.so")):
        pass
