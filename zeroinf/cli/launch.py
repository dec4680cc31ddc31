"""Starts the ranks of a command: `--num-gpus N` starts them on this machine, `--hostfile FILE` through DeepSpeed's
launcher.

Input: the command's arguments. Output: an exit code. No rank outlives the call.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from zeroinf.cli.ranks import packed
from zeroinf.distributed.ports import free_port
from zeroinf.errors import EnvironmentProblem
from zeroinf.signals import STOPPED_CODES, heeded_signals

_KNOWN_CODES = frozenset((0, 1, 2, 3, 4, 5)) | STOPPED_CODES
_POLL_S = 0.05
_GRACE_S = 10.0
"""How long ranks have to end by themselves once one has failed, and again once they are asked to: longer than they take
to notice it (PeerWatch) and to stop in order (Interrupts)."""


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


def launch_here(arguments: Sequence[str], num_gpus: int) -> int:
    """Run `zeroinf ARGUMENTS` on `num_gpus` ranks of this node, none of which outlives the call.

    Returns the exit code: that of the first rank that failed, 0 if none did. A signal that stops runs reaches each rank
    once. Raises OSError where a process cannot be started or no port is free.
    """
    command = [sys.executable, "-u", "-m", "zeroinf", *arguments]
    # How many ranks a node has is LOCAL_WORLD_SIZE to torch and LOCAL_SIZE to DeepSpeed.
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"), str(num_gpus))
    common = {**os.environ, **sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    signals = _noted_signals()
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for number in map(str, range(num_gpus)):
            environ = {**common, "RANK": number, "LOCAL_RANK": number}
            ranks.append(subprocess.Popen(command, env=environ, start_new_session=True))
        return _exit_code(_wait(ranks, signals))
    finally:
        for rank in ranks:
            rank.kill()


def launch_on_nodes(arguments: Sequence[str], hostfile: Path, num_gpus: int | None) -> int:
    """Run `zeroinf ARGUMENTS` on `num_gpus` ranks of each node in `hostfile`, or on all that it names.

    Returns the exit code. A signal reaches DeepSpeed's launcher only, which ends the ranks of all nodes.
    Raises OSError where no port is free.
    """
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical"]
    command += ["--master_port", str(free_port()), *(("--num_gpus", str(num_gpus)) if num_gpus else ())]
    command += ["--hostfile", str(hostfile), "--force_multi", "--module", "zeroinf.cli.ranks"]
    # On other nodes a shell reads the command.
    command.append(packed(arguments, os.environ))
    signals = _noted_signals()
    code = _wait([subprocess.Popen(command, start_new_session=True)], signals)
    return 128 + signals[-1] if signals else _exit_code(code)


def _noted_signals() -> list[int]:
    """The numbers of the signals that stop runs, as they come from now on. They do nothing else to this process.

    Its children are in sessions of their own: a terminal's Ctrl-C is theirs only if it is passed on.
    """
    noted: list[int] = []
    for number in heeded_signals():
        signal.signal(number, lambda number, frame: noted.append(number))
    return noted


def _wait(processes: Sequence[subprocess.Popen[bytes]], signals: Sequence[int]) -> int:
    """Pass `signals` on as they come, end those that go on long after one has failed; the code of the first to fail."""
    passed_on = failed = 0
    stops: list[tuple[float, int]] = []
    while None in (codes := [process.poll() for process in processes]):
        now = time.monotonic()
        if not failed and any(codes):
            failed = next(filter(None, codes))
            stops = [(now + _GRACE_S, signal.SIGTERM), (now + 2 * _GRACE_S, signal.SIGKILL)]
        due = list(signals[passed_on:])
        passed_on += len(due)
        if stops and now > stops[0][0]:
            due.append(stops.pop(0)[1])
        for number in due:
            for process in processes:
                process.send_signal(number)
        time.sleep(_POLL_S)
    return failed or next(filter(None, codes), 0)


def _exit_code(code: int) -> int:
    """The exit code that tells of a process which ended with `code`; what a signal ended has 128 and its number."""
    code = 128 - code if code < 0 else code
    return code if code in _KNOWN_CODES else 1
