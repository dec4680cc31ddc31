"""`--num-gpus N`: start N ranks of the same command through DeepSpeed's launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

import psutil

from zeroinf.distributed.ports import free_port
from zeroinf.errors import EnvironmentProblem

_KNOWN_CODES = frozenset((0, 1, 2, 3, 4, 5, 130, 143))


def check_gpu_count(wanted: int) -> None:
    """Raises EnvironmentProblem when fewer than `wanted` GPUs are here. Ranks on the CPU must be asked for by name."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return
    from zeroinf.hardware.gpus import read_gpus

    found = len(read_gpus(os.environ.get("CUDA_VISIBLE_DEVICES")))
    if found < wanted:
        raise EnvironmentProblem(
            f"--num-gpus {wanted}, but this machine shows {found}",
            hint="ask for fewer, check `zeroinf doctor` and CUDA_VISIBLE_DEVICES, "
            "or set DS_ACCELERATOR=cpu to run ranks on the CPU",
        )


def launch(num_gpus: int, arguments: Sequence[str]) -> int:
    """Run `zeroinf ARGUMENTS` on `num_gpus` ranks and return the exit code.

    Signals reach the ranks, which end in order; the launcher itself would kill them.
    """
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical"),
        *("--num_gpus", str(num_gpus), "--master_port", str(free_port())),
        *("--module", "zeroinf", *arguments),
    ]
    launcher = subprocess.Popen(command, start_new_session=True)

    def forward(number: int, frame: FrameType | None) -> None:
        for process in psutil.Process(launcher.pid).children(recursive=True):
            if _is_rank(process):
                process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    code = launcher.wait()
    return code if code in _KNOWN_CODES else 1


def _is_rank(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[1:4] == ["-u", "-m", "zeroinf"]
    except psutil.Error:
        return False
