"""Implements `zeroinf doctor`: checks this machine's GPUs, memory, disks and software, and measures its rates on
request.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from zeroinf.cli.command import command
from zeroinf.cli.environment import option

if TYPE_CHECKING:
    from zeroinf.hardware.checks import Check
    from zeroinf.hardware.machine import Machine
    from zeroinf.hardware.profile import Profile
    from zeroinf.hardware.rates import Rates

JSON_SCHEMA = 1


@command()
@option(
    "--nvme-path",
    "nvme_paths",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Folder in which weights would be kept; may be given several times.",
)
@option(
    "--offload",
    type=click.Choice(["none", "cpu", "nvme"]),
    default="none",
    show_default=True,
    help="Where weights would be kept.",
)
@option(
    "--engine",
    type=click.Choice(["stream", "zero"]),
    default="stream",
    show_default=True,
    help="What would run the model; with zero and --offload nvme, all that DeepSpeed's disk I/O needs must be here.",
)
@option("--num-gpus", type=click.IntRange(min=1), help="How many GPUs must be visible.")
@option(
    "--measure",
    is_flag=True,
    help="Measure links, disks, matrix products and the rest, and keep the rates for plans. Takes a minute or two.",
)
@option("--json", "as_json", is_flag=True, help="Print checks, machine and rates as one JSON object.")
def doctor(
    nvme_paths: tuple[Path, ...],
    offload: Literal["none", "cpu", "nvme"],
    engine: Literal["stream", "zero"],
    num_gpus: int | None,
    measure: bool,
    as_json: bool,
) -> None:
    """Say what this machine has, and what is missing.

    What was asked for by a flag and cannot work fails, and the exit code is 4. All else warns at most.
    """
    from zeroinf.hardware.aio_op import read_aio_op
    from zeroinf.hardware.checks import Requirements, check_machine, check_profile, require
    from zeroinf.hardware.profile import find_profile
    from zeroinf.hardware.snapshot import read_machine

    machine = read_machine(nvme_paths)
    if measure:
        _measure(machine)
    profile = find_profile(machine)
    op = read_aio_op(with_gpu=bool(machine.gpus))
    checks = check_machine(machine, op, Requirements(offload=offload, num_gpus=num_gpus, engine=engine))
    checks.append(check_profile(profile, datetime.now(UTC)))
    if as_json:
        click.echo(_as_json(checks, machine, profile))
    else:
        _print_table(checks)
        if measure:
            _print_rates(profile.rates)
    require(checks)


def _measure(machine: Machine) -> None:
    """Measure what applies and keep it; what is asked for in vain is told on stderr."""
    from zeroinf.hardware.measure.all_rates import measure_machine
    from zeroinf.hardware.profile import keep_profile

    rates = measure_machine(machine, lambda line: click.echo(line, err=True))
    path = keep_profile(machine, rates, now=datetime.now(UTC))
    click.echo(f"kept in {path}", err=True)


def _as_json(checks: list[Check], machine: Machine, profile: Profile) -> str:
    import json
    from dataclasses import asdict

    report = {
        "schema": JSON_SCHEMA,
        "checks": [asdict(check) for check in checks],
        "machine": asdict(machine),
        "rates": asdict(profile.rates),
        "profile": {name: getattr(profile, name) for name in ("path", "measured_at", "trouble")},
    }
    return json.dumps(report, indent=2, default=str)


def _print_table(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    width = max(len(check.name) for check in checks)
    labels = {"ok": ("ok  ", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "bold red")}
    for check in checks:
        console.print(Text.assemble(labels[check.status], f" {check.name:<{width}}  {check.value}"))
        if check.advice:
            console.print(Text(f"     hint: {check.advice}"))


def _print_rates(rates: Rates) -> None:
    from rich.console import Console

    from zeroinf.cli.rates import rate_rows

    console = Console(soft_wrap=True, highlight=False, markup=False)
    rows = list(rate_rows(rates))
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        console.print(f"rate {name:<{width}}  {value}")
