"""Launches of kernels past Triton's binder: what they hand to a compiled kernel is what Triton would."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import Module, Parameter

from zeroinf.compat import launches
from zeroinf.compat.launches import Launch, Recording
from zeroinf.model.quantized.expansion import Expansion, ExpansionSlot, Held, expansion_of, whole_weights


class Kernel:
    """Stands for what `triton.jit` makes: it compiles a kernel for each launch that goes through it."""

    arg_names = ("x", "y", "rows", "scale", "BLOCK")

    def __init__(self) -> None:
        self.bound: list[tuple[Any, ...]] = []
        self.direct: list[tuple[Any, ...]] = []
        self.run: Any = None

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **constants: Any) -> Any:
            self.bound.append((grid, args, constants))
            number = len(self.bound)
            return SimpleNamespace(
                run=self.run or (lambda *more: self.direct.append((number, *more))), function="f", packed_metadata="m"
            )

        return launch


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(launches, "current_of_driver", lambda: (lambda: 3, lambda device: 70 + device))
    return Kernel()


def test_later_launches_of_a_kind_go_to_its_compiled_kernel(kernel: Kernel) -> None:
    launch, x, y = Launch(kernel), torch.zeros(64), torch.zeros(64)
    for rows in (32, 48):
        launch((5, 2), (x, y), (rows, 0.25), BLOCK=16)
    assert kernel.bound == [((5, 2), (x, y, 32, 0.25), {"BLOCK": 16})]
    args = (x.data_ptr(), y.data_ptr(), 48, 0.25, None)
    assert kernel.direct == [(1, 5, 2, 1, 73, "f", "m", None, None, None, *args)]


@pytest.mark.parametrize(
    ("start", "dtype", "rows", "scale", "block", "device"),
    [
        (1, torch.float32, 32, 0.25, 16, 3),
        (0, torch.int32, 32, 0.25, 16, 3),
        (0, torch.float32, 33, 0.25, 16, 3),
        (0, torch.float32, 1, 0.25, 16, 3),
        (0, torch.float32, 1 << 31, 0.25, 16, 3),
        (0, torch.float32, -32, 0.25, 16, 3),
        (0, torch.float32, 32, 1, 16, 3),
        (0, torch.float32, 32, 0.25, 32, 3),
        (0, torch.float32, 32, 0.25, 16, 4),
    ],
)
def test_what_a_kernel_is_compiled_for_makes_a_kind(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch,
    start: int, dtype: torch.dtype, rows: int, scale: float, block: int, device: int,
) -> None:  # fmt: skip
    launch, x = Launch(kernel), torch.zeros(64)
    launch((1,), (x, x), (32, 0.25), BLOCK=16)
    monkeypatch.setattr(launches, "current_of_driver", lambda: (lambda: device, lambda device: 0))
    launch((1,), (x.view(dtype)[start:], x), (rows, scale), BLOCK=block)
    assert len(kernel.bound) == 2 and not kernel.direct


def test_constants_of_other_names_make_another_kind(kernel: Kernel) -> None:
    launch, x = Launch(kernel), torch.zeros(64)
    launch((1,), (x, x), BLOCK=4, num_warps=8)
    launch((1,), (x, x), num_warps=4, BLOCK=8)
    assert len(kernel.bound) == 2


def test_a_launcher_that_takes_other_things_leaves_launches_to_triton(kernel: Kernel) -> None:
    def refuse(*args: Any) -> None:
        raise TypeError("it takes other things")

    kernel.run, launch, x = refuse, Launch(kernel), torch.zeros(64)
    for _ in range(4):
        launch((1,), (x, x), (32, 0.25), BLOCK=16)
    assert len(kernel.bound) == 4


def test_a_kernel_that_gives_nothing_back_is_launched_by_triton(kernel: Kernel) -> None:
    class Interpreted(Kernel):
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **constants: self.bound.append((grid, args, constants))

    interpreted, x = Interpreted(), torch.zeros(64)
    launch = Launch(interpreted)
    for _ in range(2):
        launch((1,), (x, x), (32, 0.25), BLOCK=16)
    assert len(interpreted.bound) == 2


def test_what_was_recorded_is_launched_again(kernel: Kernel) -> None:
    launch, x, recording, other = Launch(kernel), torch.zeros(64), Recording(), Recording()
    with other.recording():
        launch((1,), (x, x), (32, 0.25), BLOCK=16)
    assert not other.is_whole  # it went through Triton
    with recording.recording():
        launch((1,), (x, x), (32, 0.25), BLOCK=16)
        launch((2,), (x, x), (64, 0.25), BLOCK=16)
    assert recording.is_whole
    recording.repeat()
    assert len(kernel.direct) == 4 and kernel.direct[2:] == kernel.direct[:2]


class Codes(Module):
    """A matrix that is expanded by one launch, and by an operator of torch if `computes`."""

    def __init__(self, launch: Launch, *, computes: bool) -> None:
        super().__init__()
        self.codes = Parameter(torch.zeros(4, 8))
        self.expanded = 0
        self._launch, self._computes = launch, computes
        self.expansion = Expansion(self, self._expand)

    def forward(self) -> torch.Tensor:
        return self.weight

    def _expand(self, held: Held) -> dict[str, torch.Tensor]:
        self.expanded += 1
        whole = whole_weights((4, 8), torch.float32, torch.device("cpu"))
        self._launch((1,), (whole.T, held["codes"].view(-1)), (8, 0.5), BLOCK=16)
        return {"weight": whole + 0 if self._computes else whole}


@pytest.mark.parametrize("computes", [False, True])
def test_weights_are_expanded_by_the_same_launches_at_the_same_addresses(kernel: Kernel, computes: bool) -> None:
    slot, module = ExpansionSlot(1 << 12, torch.device("cpu")), Codes(Launch(kernel), computes=computes)

    def visit(codes: torch.Tensor) -> int:
        before = len(kernel.direct) + len(kernel.bound)
        slot.end = 0
        with torch.inference_mode():
            module.codes = Parameter(codes, requires_grad=False)
            module.expansion.open(slot)
            assert slot.holds(module()) != computes and slot.end == 256
            module.expansion.close()
        assert set(module._parameters) == {"codes"}
        return len(kernel.direct) + len(kernel.bound) - before

    here, there = torch.zeros(4, 8), torch.zeros(4, 8)
    assert [visit(codes) for codes in (here, here, here, there, here, here)] == [1] * 6
    assert kernel.direct[-1] == kernel.direct[0]
    assert module.expanded == (6 if computes else 3)  # here twice, and there


def test_a_module_that_is_gone_is_held_by_nobody(kernel: Kernel) -> None:
    module = Codes(Launch(kernel), computes=False)
    assert expansion_of(module) is module.expansion
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


@pytest.fixture
def driver() -> Iterator[Any]:
    """Triton without a GPU: kernels are compiled, and launches note what they are handed."""
    import triton
    from triton.backends.compiler import GPUTarget

    found: list[tuple[Any, ...]] = []
    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 1 << 17},
        load_binary=lambda *args: (1, 2, 32, 0, 1024),
    )
    fake = SimpleNamespace(
        utils=utils,
        launcher_cls=lambda source, metadata: lambda *args: found.append((source.hash(), *args)),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 7,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        launched=found,
    )
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(fake)
    launches.current_of_driver.cache_clear()
    yield fake
    triton.runtime.driver._active = before
    launches.current_of_driver.cache_clear()


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs Triton, not interpreted",
)
def test_triton_hands_the_same_to_the_same_kernel(driver: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_kernels.py").write_text(
        "import triton\nimport triton.language as tl\n\n\n"
        "@triton.jit(do_not_specialize=['total'])\n"
        "def kernel(x, y, total, width, scale, BLOCK: tl.constexpr):\n"
        "    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)\n"
        "    tl.store(y + at * width, tl.load(x + at, mask=at < total) * scale, mask=at < total)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from some_kernels import kernel  # type: ignore[import-not-found]

    launch, x, y = Launch(kernel), torch.zeros(64), torch.zeros(64, dtype=torch.float16)
    given = [((x, y), (64, 1, 0.5)), ((x, y), (32, 16, 2.0)), ((x[1:], y), (17, 16, 0.5)), ((x, y), (1, 5, 1.0))]
    for tensors, numbers in given:
        launch((3,), tensors, numbers, BLOCK=16, num_warps=2)  # through Triton
        driver.launched.clear()
        launch((3,), tensors, numbers, BLOCK=16, num_warps=2)
        kernel[3,](*tensors, *numbers, BLOCK=16, num_warps=2)
        (source, *own), (other, *tritons) = driver.launched
        theirs = [each.data_ptr() if isinstance(each, torch.Tensor) else each for each in tritons]
        assert source == other
        assert own[:6] == theirs[:6]  # behind them come what hooks are told, and the hooks
        assert own[9:-1] == theirs[9:-1]  # the last is the constant, of which nothing is read
    sys.modules.pop("some_kernels")
