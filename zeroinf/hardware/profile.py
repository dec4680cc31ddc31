"""Keeps measured rates in the user's cache directory: one JSON file for each host, valid for the hardware that was
measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from zeroinf.errors import EnvironmentProblem
from zeroinf.hardware.json_file import first_problem, write_whole
from zeroinf.hardware.machine import Disk, Machine
from zeroinf.hardware.rates import Rates
from zeroinf.paths import cache_directory


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """Rates that were measured on a machine earlier: none before it is measured, or if there is `trouble`."""

    path: Path
    rates: Rates = field(default_factory=Rates)
    measured_at: datetime | None = None
    trouble: str | None = None


class _File(BaseModel):
    """The file: what the rates depend on, and the rates."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    version: Literal[1] = Field(default=1, alias="schema")
    measured_at: AwareDatetime
    hostname: str
    driver: str | None
    torch: str | None
    gpus: list[tuple[str, str | None]]
    volumes: dict[str, str]
    rates: Rates


def read_profile(machine: Machine) -> Rates:
    """The rates measured on `machine`; none known if there are none, or none that belong to it."""
    return find_profile(machine).rates


def find_profile(machine: Machine) -> Profile:
    """The profile kept for `machine`, with the rates of only those disks that it names and whose device is the same.

    Rates of more GPUs hold for some of them. Never raises: a file that is broken or of other hardware is a `trouble`.
    """
    path = _path(machine)
    try:
        file = _File.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return Profile(path=path)
    except OSError as error:
        return Profile(path=path, trouble=f"cannot be read: {error.strerror}")
    except ValidationError as error:
        return Profile(path=path, trouble=f"is broken: {first_problem(error)}")
    if difference := _difference(file, machine):
        return Profile(path=path, trouble=difference)
    return Profile(path=path, rates=_of_disks(file, machine.disks), measured_at=file.measured_at)


def keep_profile(machine: Machine, rates: Rates, *, now: datetime) -> Path:
    """Keep `rates`, measured on `machine` at `now`; returns the file. What is kept of the same hardware is updated.

    Raises EnvironmentProblem where the cache directory cannot be written.
    """
    path = _path(machine)
    volumes = {disk.volume: disk.device for disk in machine.disks if disk.volume in (rates.disk_gbps or {})}
    old = _same_hardware(path, machine)
    file = _File(
        measured_at=now,
        hostname=machine.hostname,
        driver=machine.driver,
        torch=machine.versions.get("torch"),
        gpus=old.gpus if old else [(gpu.name, gpu.uuid) for gpu in machine.gpus],
        volumes={**old.volumes, **volumes} if old else volumes,
        rates=old.rates.updated(rates) if old else rates,
    )
    try:
        write_whole(path, file.model_dump_json(by_alias=True, indent=2))
    except OSError as error:
        raise EnvironmentProblem(
            f"cannot keep the measured rates in {path}: {error.strerror}", hint="set ZEROINF_CACHE to another folder"
        ) from error
    return path


def _path(machine: Machine) -> Path:
    return cache_directory() / "profiles" / f"{machine.hostname or 'localhost'}.json"


def _difference(file: _File, machine: Machine) -> str | None:
    """Why the rates of `file` are not those of `machine`; None if they are."""
    now = {"driver": machine.driver, "torch": machine.versions.get("torch")}
    for name, kept in (("driver", file.driver), ("torch", file.torch)):
        if kept != now[name]:
            return f"was measured with {name} {kept}, now it is {now[name]}"
    strangers = [gpu.name for gpu in machine.gpus if (gpu.name, gpu.uuid) not in file.gpus]
    if file.hostname != machine.hostname or strangers:
        return f"was measured on other hardware: {', '.join(strangers) or file.hostname}"
    return None


def _same_hardware(path: Path, machine: Machine) -> _File | None:
    try:
        file = _File.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    return file if _difference(file, machine) is None else None


def _of_disks(file: _File, disks: Sequence[Disk]) -> Rates:
    here = {disk.volume for disk in disks if file.volumes.get(disk.volume) == disk.device}
    kept = {}
    for name in ("disk_gbps", "disk_gbps_by_requests", "disk_reads_per_s"):
        kept[name] = {volume: gbps for volume, gbps in file.rates.known.get(name, {}).items() if volume in here} or None
    return file.rates.without(*kept).updated(Rates.of("measured", **kept))
