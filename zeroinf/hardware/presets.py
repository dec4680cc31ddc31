"""Loads descriptions of other machines: presets in `configs/machines/`, and files saved by `zeroinf doctor --json`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from zeroinf.errors import UsageError
from zeroinf.hardware.json_file import first_problem
from zeroinf.hardware.machine import Machine
from zeroinf.hardware.rates import Rates
from zeroinf.paths import configs_directory


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineFile:
    """A machine, and what is known of its rates."""

    machine: Machine
    rates: Rates


class _File(BaseModel):
    """The schema of a machine file: a preset has `about`, a saved doctor's report `checks` and `profile`."""

    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = Field(alias="schema")
    machine: Machine
    rates: Rates = Rates()
    about: str = ""
    checks: list[Any] = []
    profile: dict[str, Any] | None = None


def preset_names() -> tuple[str, ...]:
    """Names of all machine presets, sorted."""
    return tuple(sorted(_presets()))


def load_machine(name_or_path: str) -> MachineFile:
    """The preset of that name (in any case), else the machine in that JSON file.

    Raises:
        UsageError: there is neither, or the file is not what `zeroinf doctor --json` writes; the key is named.
    """
    presets = {name.lower(): path for name, path in _presets().items()}
    path = presets.get(name_or_path.lower(), Path(name_or_path).expanduser())
    try:
        return _parse(path.read_bytes(), path)
    except OSError as error:
        close = get_close_matches(name_or_path.lower(), presets, n=1)
        nearest = f"did you mean {presets[close[0]].stem}? " if close else ""
        raise UsageError(
            f"no machine {name_or_path!r}: no preset has that name, and as a file: {error.strerror}",
            hint=f"{nearest}presets: {', '.join(preset_names())}; `zeroinf doctor --json > FILE` saves a machine",
        ) from error


def gpu_names() -> tuple[str, ...]:
    """Names of all GPUs of the presets, sorted: a preset's name without the number of GPUs and its host memory."""
    return tuple(sorted(_by_gpu()))


def with_gpu(machine: Machine, rates: Rates, name: str) -> tuple[Machine, Rates]:
    """The machine with GPUs of that name (in any case) in the place of its own, one where it has none, and their
    published rates in the place of measured ones.

    Raises:
        UsageError: no preset has such a GPU.
    """
    presets = {gpu.lower(): preset for gpu, preset in _by_gpu().items()}
    if name.lower() not in presets:
        close = get_close_matches(name.lower(), presets, n=1)
        nearest = f"did you mean {next(one for one in gpu_names() if one.lower() == close[0])}? " if close else ""
        raise UsageError(f"--gpu {name}: no preset has such a GPU", hint=f"{nearest}known: {', '.join(gpu_names())}")
    preset = load_machine(presets[name.lower()])
    gpu = preset.machine.gpus[0]
    gpus = tuple(replace(gpu, index=index) for index in range(max(1, len(machine.gpus))))
    return replace(machine, gpus=gpus), rates.without(*_GPU_RATES, *_OF_ONE_GPU).updated(preset.rates.only(*_GPU_RATES))


@cache
def rates_of_gpu(name: str) -> Rates:
    """Arithmetic and memory rates of a GPU by the name that its driver gives it, as the first preset with such a GPU
    has them; none known where no preset has one."""
    for preset in _by_gpu().values():
        file = load_machine(preset)
        if file.machine.gpus[0].name == name:
            return file.rates.only("matmul_tflops", "hbm_gbps")
    return Rates()


_GPU_RATES = ("link_gbps", "matmul_tflops", "hbm_gbps", "all_gather_gbps")
# Measured with the machine's own GPUs.
_OF_ONE_GPU = (
    "links_gbps",
    "context_bytes",
    "workspace_bytes",
    "nccl_bytes",
    "page_lock_gbps",
    "shared_page_lock_gbps",
)


def _by_gpu() -> dict[str, str]:
    """The first preset with each GPU."""
    found: dict[str, str] = {}
    for preset in preset_names():
        _, _, rest = preset.partition("x")
        found.setdefault("-".join(part for part in rest.split("-") if not part.endswith("GiB")), preset)
    return found


def _parse(content: bytes, path: Path) -> MachineFile:
    try:
        file = _File.model_validate_json(content)
    except ValidationError as error:
        raise UsageError(
            f"machine file {path}: {first_problem(error)}",
            hint="it should be what `zeroinf doctor --json` prints, or a copy of a file in configs/machines",
        ) from None
    return MachineFile(machine=file.machine, rates=file.rates)


def _presets() -> dict[str, Path]:
    return {path.stem: path for path in (configs_directory() / "machines").glob("*.json")}
