"""`zeroinf doctor`: what this machine has, what it lacks, and what to do about it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

if TYPE_CHECKING:
    from zeroinf.hardware.checks import Check
    from zeroinf.hardware.machine import Machine

JSON_SCHEMA = 1


@click.command()
@click.option(
    "--nvme-path",
    "nvme_paths",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Folder that weights would rest in; may be given several times.",
)
@click.option(
    "--offload",
    type=click.Choice(["none", "cpu", "nvme"]),
    default="none",
    show_default=True,
    help="Where weights would rest; with nvme, all that DeepSpeed's disk I/O needs must be here.",
)
@click.option("--num-gpus", type=click.IntRange(min=1), help="How many GPUs must be visible.")
@click.option("--json", "as_json", is_flag=True, help="Print checks and machine as one JSON object.")
def doctor(
    nvme_paths: tuple[Path, ...], offload: Literal["none", "cpu", "nvme"], num_gpus: int | None, as_json: bool
) -> None:
    """Say what this machine has, and what is missing.

    What was asked for by a flag and cannot work fails, and the exit code is 4. All else warns at most.
    """
    from zeroinf.hardware.aio_op import read_aio_op
    from zeroinf.hardware.checks import Asked, check_machine, require
    from zeroinf.hardware.snapshot import read_machine

    machine = read_machine(nvme_paths)
    op = read_aio_op(with_gpu=bool(machine.gpus))
    checks = check_machine(machine, op, Asked(offload=offload, num_gpus=num_gpus))
    if as_json:
        click.echo(_as_json(checks, machine))
    else:
        _print_table(checks)
    require(checks)


def _as_json(checks: list[Check], machine: Machine) -> str:
    import json
    from dataclasses import asdict

    report = {"schema": JSON_SCHEMA, "checks": [asdict(check) for check in checks], "machine": asdict(machine)}
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
