"""Ranks that `zeroinf run --num-gpus` starts: what they are told, when they are ended, and the exit code they leave.

A script stands in for the Python that would run a rank, or DeepSpeed's launcher.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from zeroinf.cli import launch
from zeroinf.distributed import watch
from zeroinf.distributed.world import World, world_from_environment
from zeroinf.runs import interrupts

Start = Callable[..., "subprocess.Popen[bytes]"]

HERE = "launch.launch_here(['run', '--prompt', '$(id) \\'\"'], 2)"
ON_NODES = "launch.launch_on_nodes(['run'], Path('hosts'), None)"

RECORD_SIGNALS = """
def record(number, frame):
    with open(f"{rank}.signals", "a") as file:
        print(number, file=file)

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, record)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start(rank, call=...)`: a process whose exit code is that of `call`, which starts ranks that run `rank`.

    They run in `tmp_path`, and note their process there in a file once they are ready.
    """
    processes: list[subprocess.Popen[bytes]] = []

    def begin(
        rank: str, *, ready: str = "", call: str = HERE, grace_s: float = 60, before: str = ""
    ) -> subprocess.Popen[bytes]:
        python = tmp_path / "python"
        python.write_text(
            f"#!{sys.executable}\nimport json, os, signal, sys, time\nrank = os.environ.get('RANK', '0')\n{ready}\n"
            f"open(f'{{rank}}.new', 'w').write(str(os.getpid()))\nos.rename(f'{{rank}}.new', f'{{rank}}.pid')\n{rank}"
        )
        python.chmod(0o755)
        script = (
            "import os, sys\nfrom pathlib import Path\nfrom zeroinf.cli import launch\n"
            f"sys.executable, launch._GRACE_S = {str(python)!r}, {grace_s}\n{before}\nsys.exit({call})"
        )
        with (tmp_path / "stderr").open("wb") as stderr:
            command = [sys.executable, "-c", script]
            processes.append(subprocess.Popen(command, cwd=tmp_path, process_group=0, stderr=stderr))
        return processes[-1]

    yield begin
    for launcher in processes:
        launcher.kill()
        launcher.wait()
    for process in psutil.process_iter(["cmdline"]):  # ranks whose launcher was killed are nobody's children
        if str(tmp_path / "python") in (process.info["cmdline"] or ()):
            with suppress(psutil.NoSuchProcess):
                process.kill()


def pids(folder: Path) -> list[int]:
    return [int(file.read_text()) for file in folder.glob("*.pid")]


def wait_for_ranks(folder: Path, count: int = 2) -> None:
    deadline = time.monotonic() + 60
    while len(pids(folder)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def signals_of(folder: Path, rank: int) -> list[int]:
    file = folder / f"{rank}.signals"
    return [int(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_each_rank_has_the_command_and_the_environment_and_is_told_its_place(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inherited = {"CUDA_VISIBLE_DEVICES": "3,1", "OMP_NUM_THREADS": "7"}
    for name, value in {**inherited, "LOCAL_WORLD_SIZE": "9", "MASTER_ADDR": "elsewhere"}.items():
        monkeypatch.setenv(name, value)
    assert start("json.dump([sys.argv[1:], dict(os.environ)], open(f'{rank}.json', 'w'))").wait(60) == 0
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for rank, (arguments, environ) in enumerate(told):
        assert arguments == ["-u", "-m", "zeroinf", "run", "--prompt", "$(id) '\""]
        assert world_from_environment(environ) == World(rank=rank, size=2, local_rank=rank, local_size=2, launched=True)
        assert environ["LOCAL_SIZE"] == "2", "DeepSpeed's name, by which it knows that all ranks are here"
        assert environ["MASTER_ADDR"] == "127.0.0.1"
        assert environ.items() >= inherited.items()
    assert told[0][1]["MASTER_PORT"] == told[1][1]["MASTER_PORT"]


@pytest.mark.parametrize("call", [HERE, ON_NODES])
@pytest.mark.parametrize(("end", "code"), [(0, 0), (3, 3), (5, 5), (143, 143), (77, 1), (-9, 1), (-15, 143)])
def test_the_exit_code_is_that_of_a_rank_where_it_has_a_meaning(call: str, end: int, code: int, start: Start) -> None:
    last = f"os.kill(os.getpid(), {-end})" if end < 0 else f"sys.exit({end})"
    assert start(f"if rank == ('1' if 'RANK' in os.environ else '0'): {last}", call=call).wait(60) == code


@pytest.mark.parametrize(("first", "code"), [(0, 3), (1, 4)])
def test_of_two_ranks_that_fail_the_first_gives_the_exit_code(first: int, code: int, start: Start) -> None:
    gone = f"os.path.exists('{first}.pid') and not os.path.exists('/proc/' + open('{first}.pid').read())"
    wait = f"while rank != '{first}' and not ({gone}): time.sleep(0.02)"  # the launcher has seen it end
    assert start(f"{wait}\nsys.exit(3 + int(rank))").wait(60) == code


def test_ranks_that_end_by_themselves_soon_after_one_has_failed_are_left_alone(start: Start, tmp_path: Path) -> None:
    rank = "if rank == '0': sys.exit(3)\ntime.sleep(1)"
    assert start(rank, ready=RECORD_SIGNALS).wait(60) == 3
    assert signals_of(tmp_path, 1) == []


@pytest.mark.parametrize("ready", ["", RECORD_SIGNALS])
def test_a_rank_that_goes_on_long_after_another_has_failed_is_asked_to_end_and_then_killed(
    ready: str, start: Start, tmp_path: Path
) -> None:
    rank = "while rank == '1' or not os.path.exists('1.pid'): time.sleep(0.02)\nsys.exit(3)"
    process = start(rank, ready=ready, grace_s=2.0 if ready else 0.2)  # time to record the signal
    assert process.wait(60) == 3
    assert len(pids(tmp_path)) == 2
    assert not any(map(lives, pids(tmp_path)))
    assert signals_of(tmp_path, 1) == ([signal.SIGTERM] if ready else [])


def test_ranks_have_longer_to_end_than_they_take_to_notice_and_to_stop_in_order() -> None:
    notices = watch._POLL_S + 2 * watch._GRACE_S
    stops = interrupts._ONE_KEY_S + interrupts.GRACE_S + notices
    assert max(2 * notices, stops) < launch._GRACE_S


@pytest.mark.parametrize(
    ("number", "code", "to_the_group"),
    [
        (signal.SIGINT, 130, True),
        (signal.SIGTERM, 143, True),
        (signal.SIGTERM, 143, False),
        (signal.SIGHUP, 129, True),
        (signal.SIGUSR1, 138, False),
    ],
)
def test_a_signal_reaches_each_rank_once(
    to_the_group: bool, number: int, code: int, start: Start, tmp_path: Path
) -> None:
    process = start(f"while not os.path.exists(f'{{rank}}.signals'): time.sleep(0.02)\ntime.sleep(0.5)\n"
                    f"sys.exit({code})", ready=RECORD_SIGNALS)  # fmt: skip
    wait_for_ranks(tmp_path)
    (os.killpg if to_the_group else os.kill)(process.pid, number)
    assert process.wait(60) == code
    assert [signals_of(tmp_path, rank) for rank in range(2)] == [[number], [number]]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_reaches_deepspeeds_launcher_once_whose_own_code_does_not_tell_of_it(
    number: int, code: int, start: Start, tmp_path: Path
) -> None:
    rank = "while not os.path.exists('0.signals'): time.sleep(0.02)\ntime.sleep(0.5)\nsys.exit(1)"
    process = start(rank, ready=RECORD_SIGNALS, call=ON_NODES)
    wait_for_ranks(tmp_path, 1)
    os.killpg(process.pid, number)
    assert process.wait(60) == code
    assert signals_of(tmp_path, 0) == [number]


def test_ranks_that_do_not_yet_listen_to_a_signal_end_as_stopped(start: Start, tmp_path: Path) -> None:
    process = start("time.sleep(600)")
    wait_for_ranks(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143


def test_a_rank_that_cannot_be_started_leaves_none_behind(start: Start, tmp_path: Path) -> None:
    before = """
started = []
def popen(*args, Popen=launch.subprocess.Popen, **kwargs):
    if started:
        while not os.path.exists("0.pid"): pass
        raise OSError("no more processes")
    started.append(Popen(*args, **kwargs))
    return started[0]
launch.subprocess.Popen = popen"""
    process = start("time.sleep(600)", before=before)
    assert process.wait(60) == 1
    assert "no more processes" in (tmp_path / "stderr").read_text()
    (pid,) = pids(tmp_path)
    deadline = time.monotonic() + 60
    while lives(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)
