"""Operators of torch that expand a matrix, or a stack of matrices, in one call: on a GPU by one kernel.

On the meta device an operator does nothing, and counts as one kernel that reads codes and writes weights. Its first
argument, `whole` (..., rows, columns; strided), is its output. Before a kernel is used, it expands random codes of the
same form; where that fails, or gives other bits than the operators of torch, those do the work.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from zeroinf.errors import EnvironmentProblem

_LIBRARY: Any = torch.library.Library("zeroinf", "DEF")  # type: ignore[no-untyped-call]
# A stack, rows and columns that every format's blocks and groups divide, and tiles as most matrices have them.
_TRIAL = 2, 96, 1024

Random = Callable[[int, int, int, torch.Generator], tuple[Any, ...]]
"""Makes random arguments of an operator, those after `whole`: for a stack, rows and columns."""


@dataclass(frozen=True, slots=True)
class Example:
    """A form of codes that an operator expands, with which its kernel is tested and measured."""

    operator: str
    """Name under `torch.ops.zeroinf`, and of the function in `expansion_kernels`."""
    random: Random


EXAMPLES: dict[str, Example] = {}
"""All forms of codes that have a kernel, by the names that readers know; those of the modules that are imported."""


def fused(
    schema: str,
    in_torch: Callable[..., None],
    like: Callable[..., Random],
    examples: Mapping[str, Random],
) -> Callable[..., None]:
    """The operator of `schema`: `in_torch` on the CPU, the function of its name in `expansion_kernels` on a GPU.

    `like` takes the operator's arguments and returns what makes random ones of the same form, for a trial
    of the kernel: an object that equals others of the same form.
    """
    name = schema.partition("(")[0]
    OPERATORS[name] = found = Fused(name, in_torch, like)
    _LIBRARY.define(schema)
    EXAMPLES.update({title: Example(name, random) for title, random in examples.items()})
    _LIBRARY.impl(name, in_torch, "CPU")
    _LIBRARY.impl(name, found, "CUDA")
    _LIBRARY.impl(name, _on_paper, "Meta")
    operator: Callable[..., None] = getattr(torch.ops.zeroinf, name)

    def fill(whole: torch.Tensor, *args: Any) -> None:
        (found if whole.is_cuda else operator)(whole, *args)  # torch's dispatcher takes as long as some kernels

    return fill


class Fused:
    """An operator on a GPU: its kernel where that gives the bits of `in_torch`, else `in_torch`."""

    def __init__(self, name: str, in_torch: Callable[..., None], like: Callable[..., Random]) -> None:
        """As `fused` has them."""
        self.like = like
        self._name, self._in_torch = name, in_torch
        self._known: dict[Any, bool] = {}

    def __call__(self, whole: torch.Tensor, *args: Any) -> None:
        """Fill `whole`."""
        (self._run_kernel if self._is_exact(whole.device, whole, *args) else self._in_torch)(whole, *args)

    def compile(self, device: torch.device, whole: torch.Tensor, *args: Any) -> None:
        """Make a call that is like this one, of tensors on the meta device, find its kernel tried and compiled."""
        if self._is_exact(device, whole, *args):
            self._run_kernel(whole, *args)

    def _is_exact(self, device: torch.device, whole: torch.Tensor, *args: Any) -> bool:
        random = self.like(whole, *args)
        form = random, whole.dtype, whole.stride(-1) == 1
        if form not in self._known:
            self._known[form] = agrees(self._run_kernel, self._in_torch, random, whole, device)
        return self._known[form]

    def _run_kernel(self, whole: torch.Tensor, *args: Any) -> None:
        _kernel(self._name)(whole, *args)


OPERATORS: dict[str, Fused] = {}
"""By their names under `torch.ops.zeroinf`; those of the modules that are imported."""


def fills_units(columns: int, groups: int) -> bool:
    """Whether groups of columns are of a multiple of eight, as kernels take them."""
    return columns % (8 * groups) == 0


def random_bytes(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device=generator.device)


def random_words(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return random_bytes(generator, *shape, 4).view(torch.int32)[..., 0]


def random_groups(generator: torch.Generator, groups: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, groups, shape, dtype=torch.int32, generator=generator, device=generator.device)


def random_scales(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return (torch.rand(shape, generator=generator, device=generator.device) + 0.5).to(dtype)


def _kernel(name: str) -> Callable[..., None]:
    from zeroinf.model.quantized import expansion_kernels

    kernel: Callable[..., None] = getattr(expansion_kernels, name)
    return kernel


def agrees(
    kernel: Callable[..., None],
    in_torch: Callable[..., None],
    random: Random,
    like: torch.Tensor,
    device: torch.device,
) -> bool:
    """Whether both fill a tensor with the same bits, in the dtype and order of `like`; warns where they do not.

    Errors of the kernel are disagreement.
    """
    stack, rows, columns = _TRIAL
    args = [
        one.to(device) if isinstance(one, torch.Tensor) else one
        for one in random(stack, rows, columns, torch.Generator().manual_seed(0))
    ]
    found, right = (torch.empty(_TRIAL, dtype=like.dtype, device=device) for _ in range(2))
    if like.stride(-1) != 1:
        found = torch.empty(stack, columns, rows, dtype=like.dtype, device=device).mT
    in_torch(right, *args)
    try:
        for _ in range(2):  # what is compiled is launched in another way than what is known
            found.zero_()
            kernel(found, *args)
            if not torch.equal(found.nan_to_num(), right.nan_to_num()):
                break
        else:
            return True
        why = "results differ"
    except Exception as error:  # Triton has errors of many kinds, and none of them may end a run
        why = str(error).partition("\n")[0]
    warnings.warn(f"weights are expanded by operators of torch, slower, since a kernel fails: {why}", stacklevel=2)
    return False


def _on_paper(*ignored: Any) -> None:
    """Nothing is computed."""


def require_kernels(device: torch.device) -> None:
    """Raise EnvironmentProblem where `device` is a GPU for which kernels cannot be built."""
    if device.type != "cuda":
        return
    try:
        whole = torch.empty(1, 32, dtype=torch.bfloat16, device=device)
        packed = torch.zeros(1, 34, dtype=torch.uint8, device=device)
        _kernel("expand_ggml")(whole, packed, 8, 32, 34, None)
    except (ImportError, RuntimeError, OSError) as error:
        raise EnvironmentProblem(
            f"quantized weights cannot be expanded on this GPU: {str(error).splitlines()[0]}",
            hint="Triton needs a C compiler (apt install gcc)",
        ) from error
