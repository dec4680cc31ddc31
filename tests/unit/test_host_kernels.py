"""Attention on the CPU over records in host memory: the compiled kernel gives what torch's operators give."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from zeroinf.errors import EnvironmentProblem
from zeroinf.generation.attention import Scores, attend_row
from zeroinf.generation.host_kernels import CompiledKernel, HostStep, TorchKernel, host_kernel
from zeroinf.generation.records import parts, read, write
from zeroinf.hardware import host_library
from zeroinf.hardware.host_library import ThreadPool
from zeroinf.model.cache_layout import KvDtype, Record, TokenState

TOKENS = (1, 2, 31, 33, 200, 517)
_LONGER_THAN_AWAKE_S = 0.03


@pytest.fixture(scope="module")
def kernel() -> CompiledKernel:
    return CompiledKernel(3)


class Rows:
    """Rows of `TOKENS` tokens behind each other, of which a window may hide the first ones."""

    def __init__(
        self,
        dtype: str,
        kv: KvDtype = "model",
        heads: tuple[int, int] = (6, 2),
        widths: tuple[int, int] = (32, 32),
        window: int | None = None,
        scores: Scores | None = None,
    ) -> None:
        torch.manual_seed(0)
        kind = getattr(torch, dtype)
        states = [TokenState(heads=heads[1], width=width, dtype=dtype) for width in widths]
        self.record = Record(keys=states[0], values=states[1], dtype=kv)
        total = sum(TOKENS)
        keys, values = (2 * torch.randn(1, heads[1], total, width) for width in widths)
        self.memory = torch.empty(total, self.record.nbytes, dtype=torch.uint8)
        write(self.record, self.memory[None], keys.to(kind), values.to(kind))
        ends = torch.tensor(TOKENS).cumsum(0)
        self.fresh = self.memory[ends - 1].clone()
        self.memory[ends - 1] = 255  # to be put there by the kernel
        counts = torch.tensor(TOKENS).clamp(max=window or total)
        self.rows = torch.stack((ends - counts, counts), dim=1)
        self.query = torch.randn(len(TOKENS), heads[0], widths[0]).to(kind)
        self.scores = scores or Scores(widths[0] ** -0.5, None, None)

    def by(self, kernel: CompiledKernel | TorchKernel) -> torch.Tensor:
        out = self.query.new_empty(*self.query.shape[:2], self.record.values.width)
        step = HostStep(record=self.record, fresh=self.fresh, query=self.query, out=out, scores=self.scores)
        assert kernel.wait(kernel.submit(step, self.memory, self.rows, None), 60)
        return out

    def exact(self) -> torch.Tensor:
        """In float32, of records that are all in their places."""
        found = []
        record = self.record
        for row, (first, count) in enumerate(self.rows.tolist()):
            keys, values = (each[0].float() for each in read(record, self.memory[None, first : first + count]))
            found.append(attend_row(self.query[row, :, None].float(), keys, values, None, self.scores)[:, 0])
        return torch.stack(found)


def scores_of(heads: int, width: int, *, softcap: float | None = None, sinks: bool = False) -> Scores:
    return Scores(width**-0.5, softcap, torch.linspace(-2, 3, heads) if sinks else None)


@pytest.mark.parametrize(
    "rows",
    [
        {"dtype": "float32"},
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
        {"dtype": "float32", "kv": "int8"},
        {"dtype": "bfloat16", "kv": "int8", "heads": (8, 1), "widths": (64, 64)},
        {"dtype": "bfloat16", "kv": "int8", "heads": (6, 2), "widths": (96, 40)},
        {"dtype": "float32", "window": 40},
        {"dtype": "float32", "heads": (4, 4), "widths": (24, 8)},
        {"dtype": "bfloat16", "heads": (14, 2), "widths": (192, 128)},
        {"dtype": "float16", "heads": (12, 1), "widths": (80, 80)},
        {"dtype": "float32", "heads": (6, 3), "widths": (5, 7), "scores": scores_of(6, 5, sinks=True)},
        {"dtype": "bfloat16", "scores": scores_of(6, 32, softcap=5.0, sinks=True), "window": 130},
        {"dtype": "float32", "heads": (40, 40), "widths": (128, 128)},
    ],
    ids=lambda rows: " ".join(f"{name}={value}" for name, value in rows.items() if name != "scores"),
)
def test_the_compiled_kernel_attends_as_torch_does(rows: dict[str, Any], kernel: CompiledKernel) -> None:
    case = Rows(**rows)
    found, exact = case.by(kernel).float(), case.exact()
    limit = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1e-2}[rows["dtype"]]
    assert float((found - exact).abs().max() / exact.abs().max()) < limit
    new = case.rows.sum(1) - 1
    for put, given in zip(parts(case.record, case.memory[new]), parts(case.record, case.fresh), strict=True):
        assert torch.equal(put, given)


def test_so_does_torchs_own_way() -> None:
    case = Rows("float32", scores=scores_of(6, 32, sinks=True), window=40)
    found = case.by(TorchKernel())
    assert torch.allclose(found, case.exact(), atol=1e-5)


def test_what_is_no_number_stays_none(kernel: CompiledKernel) -> None:
    case = Rows("float32")
    case.query[3] = float("nan")
    case.query[4] = float("inf")
    found = case.by(kernel)
    assert found[3:5].isnan().all()
    assert found[[0, 1, 2, 5]].isfinite().all()


@pytest.mark.full  # the compiler takes seconds for each
@pytest.mark.parametrize("machine", ["x86-64", "haswell"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_instructions_of_older_processors_give_the_same(machine: str, dtype: str, kernel: CompiledKernel) -> None:
    older, case = CompiledKernel(2, machine), Rows(dtype, scores=scores_of(6, 32, softcap=9.0))
    assert torch.allclose(case.by(older).float(), case.by(kernel).float(), atol=1e-2 if dtype != "float32" else 1e-5)


@pytest.mark.full  # the compiler takes seconds
@pytest.mark.parametrize(
    "rows",
    [
        {"heads": (4, 2), "widths": (64, 64)},
        {"heads": (14, 2), "widths": (192, 128), "scores": scores_of(14, 192, softcap=5.0, sinks=True), "window": 130},
        {"heads": (71, 1), "widths": (64, 96)},
        {
            "heads": (14, 2),
            "widths": (192, 128),
            "scores": scores_of(14, 192, softcap=5.0),
            "window": 130,
            "kv": "int8",
        },
        {"heads": (8, 4), "widths": (32, 64), "kv": "int8"},
    ],
    ids=lambda rows: f"{rows['heads']} {rows.get('kv', '')}".strip(),
)
def test_a_matrix_unit_gives_the_same(rows: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if "avx512_bf16" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        pytest.skip("tiles are emulated for processors with products of pairs")
    monkeypatch.setenv("CXX", f"c++ -include {Path(__file__).parents[1] / 'fake_tiles.h'}")
    host_library.host_library.cache_clear()
    case = Rows("bfloat16", **rows)
    found, exact = case.by(CompiledKernel(2)).float(), case.exact()
    host_library.host_library.cache_clear()
    limit = 7e-3 if "kv" in rows else 5e-3  # codes are read as bfloat16 here
    assert float((found - exact).abs().max() / exact.abs().max()) < limit


@pytest.mark.parametrize("kind", [lambda: CompiledKernel(2), TorchKernel], ids=["compiled", "torch"])
def test_a_step_waits_for_its_flag(kind: Callable[[], CompiledKernel | TorchKernel]) -> None:
    kernel, case, flag = kind(), Rows("float32"), torch.tensor([0])
    outs = [torch.zeros(*case.query.shape[:2], 32) for _ in range(3)]
    steps = [
        HostStep(record=case.record, fresh=case.fresh, query=case.query, out=out, scores=case.scores) for out in outs
    ]
    numbers = [kernel.submit(step, case.memory, case.rows, flag) for step in steps]
    assert numbers == [1, 2, 3]
    assert not kernel.wait(1, 0.02)
    flag.fill_(2)
    assert kernel.wait(2, 60)
    assert not kernel.wait(3, 0.02)
    assert torch.allclose(outs[1], case.exact(), atol=1e-5)
    kernel.close()
    assert not outs[2].any(), "what has not begun is left out"


def test_no_step_is_lost_whenever_its_flag_is_raised() -> None:
    """Threads of two kernels share processors; they sleep, look for the flag, or still work when a step comes."""
    draw, case = Random(0), Rows("float32")
    processors = (*os.sched_getaffinity(0), min(os.sched_getaffinity(0))) * 2
    kernels = [CompiledKernel(processors) for _ in range(2)]
    flags, outs = torch.zeros(2, 1, dtype=torch.int64), torch.empty(2, *case.query.shape[:2], 32)
    steps = [
        HostStep(record=case.record, fresh=case.fresh, query=case.query, out=out, scores=case.scores) for out in outs
    ]
    exact = case.by(kernels[0])
    memories = [case.memory, case.memory.clone()]
    kernels[1].wait(kernels[1].submit(steps[1], memories[1], case.rows, None), 60)
    for _ in range(500):
        outs.fill_(torch.nan)
        asked = list(zip(kernels, steps, memories, flags, strict=True))
        numbers = [kernel.submit(step, memory, case.rows, flag) for kernel, step, memory, flag in asked]
        time.sleep(draw.choice((0, 0, 1e-5, 1e-4, 1e-3, _LONGER_THAN_AWAKE_S * (draw.random() < 0.1))))
        flags.fill_(numbers[0])
        for kernel, number in zip(kernels, numbers, strict=True):
            assert kernel.wait(number, 60)
        assert torch.equal(outs, exact.expand_as(outs))
        if draw.random() < 0.1:
            kernels[0].clear(torch.empty(1 << 20, dtype=torch.uint8))
    left = [kernel.submit(step, memory, case.rows, flag) for kernel, step, memory, flag in asked]
    flags[0] = left[0]  # one is closed at work, the other as it waits
    for kernel in kernels:
        kernel.close()
    assert left == [number + 1 for number in numbers]


def test_a_forked_process_lets_the_threads_be() -> None:
    kernel = CompiledKernel(2)
    child = os.fork()
    if not child:
        kernel.close()
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert Rows("float32").by(kernel).isfinite().all()
    kernel.close()


def test_threads_that_the_system_does_not_have_are_said() -> None:
    held = Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]
    most = int(held) * os.sysconf("SC_PAGE_SIZE") + (64 << 20)
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        with pytest.raises(EnvironmentProblem, match="1000 threads"):
            ThreadPool(1000)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_memory_is_read_whole() -> None:
    pool = ThreadPool(2)
    memory = torch.arange((1 << 20) + 512, dtype=torch.int32)
    sums = [pool.read(memory.data_ptr(), memory.nbytes) for _ in range(2)]
    memory[-1] += 7
    assert sums[0] == sums[1]
    assert pool.read(memory.data_ptr(), memory.nbytes) == sums[0] + 7
    pool.close()


def test_threads_stay_on_their_processors() -> None:
    processor, case = min(os.sched_getaffinity(0)), Rows("float32")
    before = {thread.name for thread in Path("/proc/self/task").iterdir()}
    kernel = CompiledKernel((processor,) * 3)
    case.by(kernel)
    kernel.clear(case.memory)
    assert not case.memory.any()
    new = [int(thread.name) for thread in Path("/proc/self/task").iterdir() if thread.name not in before]
    assert len(new) == 3
    assert all(os.sched_getaffinity(thread) == {processor} for thread in new)
    kernel.close()


def test_without_a_compiler_torch_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    host_library.host_library.cache_clear()
    assert "no-such-compiler" in host_library.why_no_host_kernel()
    assert isinstance(host_kernel((0, 1)), TorchKernel)
    with pytest.raises(EnvironmentProblem, match="no C\\+\\+ compiler"):
        ThreadPool(1)


def test_what_does_not_compile_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "broken.cpp"
    source.write_text("#error no\n")
    monkeypatch.setattr(host_library, "SOURCE", source)
    monkeypatch.setenv("ZEROINF_CACHE", str(tmp_path / "cache"))
    host_library.host_library.cache_clear()
    with pytest.raises(EnvironmentProblem, match="does not compile"):
        ThreadPool(1)
    assert list((tmp_path / "cache" / "host-attention").iterdir()) == []
