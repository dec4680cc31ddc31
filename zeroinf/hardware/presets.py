"""Loads descriptions of other machines: presets in `configs/machines/`, and files saved by `zeroinf doctor --json`."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
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
