"""`--num-gpus N` and `--hostfile FILE`: start ranks of the same command through DeepSpeed's launcher."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

from zeroinf.cli.ranks import packed
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


def check_pdsh() -> None:
    """Raises EnvironmentProblem where DeepSpeed's launcher would not reach other nodes."""
    if shutil.which("pdsh") is None:
        raise EnvironmentProblem(
            "--hostfile: DeepSpeed's launcher needs pdsh",
            hint="apt install pdsh, or start it on each node: torchrun --nnodes N --node-rank K ... -m zeroinf run ...",
        )


def launch(arguments: Sequence[str], *, num_gpus: int | None, hostfile: Path | None) -> int:
    """Run `zeroinf ARGUMENTS` on `num_gpus` ranks of this node, or of each node in `hostfile`; returns the exit code.

    Signals reach the ranks of this node, which end in order; the launcher itself would kill them. Those of other nodes
    only the launcher reaches.
    """
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical"]
    command += ["--master_port", str(free_port()), *(("--num_gpus", str(num_gpus)) if num_gpus else ())]
    if hostfile is None:
        command += ["--module", "zeroinf", *arguments]
    else:
        # On other nodes a shell reads the command.
        word = packed(arguments, os.environ)
        command += ["--hostfile", str(hostfile), "--force_multi", "--module", "zeroinf.cli.ranks", word]
    launcher = subprocess.Popen(command, start_new_session=True)
    stopped_by = 0

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal stopped_by
        stopped_by = number
        processes = [p for p in psutil.Process(launcher.pid).children(recursive=True) if _is_rank(p)]
        for process in processes if hostfile is None else [launcher]:
            process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    code = launcher.wait()
    if hostfile is not None and stopped_by:
        return 128 + stopped_by
    return code if code in _KNOWN_CODES else 1


def _is_rank(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[1:4] == ["-u", "-m", "zeroinf"]
    except psutil.Error:
        return False
