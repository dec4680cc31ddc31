"""Starting `zeroinf` as a user does, and looking at the processes that come of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from forked import CHANGES, RANK_NAME, Forked

from zeroinf.distributed.ports import free_port
from zeroinf.jobs.journal import read_records
from zeroinf.jobs.output_files import journal_path

Launcher = Literal["none", "num-gpus", "deepspeed", "torchrun"]
Process = subprocess.Popen[str] | Forked

_BIN = Path(sys.executable).parent
_FAMILY = "TEST_FAMILY"


@dataclass(frozen=True)
class Finished:
    """A process that has ended."""

    code: int
    out: str
    err: str


def command_line(arguments: Sequence[str], *, ranks: int, launcher: Launcher) -> list[str]:
    """`zeroinf run ARGUMENTS` on `ranks` ranks, as each launcher spells it."""
    run = ["zeroinf", "run", *arguments]
    port = str(free_port())
    match launcher:
        case "none":
            return run
        case "num-gpus":
            return ["zeroinf", "run", "--num-gpus", str(ranks), *arguments]
        case "deepspeed":
            return [str(_BIN / "deepspeed"), "--num_gpus", str(ranks), "--master_port", port, "--module", *run]
        case "torchrun":
            return [str(_BIN / "torchrun"), "--nproc-per-node", str(ranks), "--master-port", port, "-m", *run]


def run_zeroinf(
    arguments: Sequence[str],
    *,
    ranks: int = 1,
    launcher: Launcher = "none",
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
    redirects: Mapping[int, str | None] | None = None,
    timeout: float = 120,
) -> Finished:
    """Start it, wait for its end, and return what came of it."""
    how: dict[str, Any] = {"ranks": ranks, "launcher": launcher, "env": env, "redirects": redirects}
    with started(arguments, **how, stdin=stdin is not None) as process:
        out, err = process.communicate(stdin, timeout=timeout)
        return Finished(process.returncode, out, err)


@contextmanager
def started(
    arguments: Sequence[str],
    *,
    ranks: int = 1,
    launcher: Launcher = "none",
    env: Mapping[str, str] | None = None,
    stdin: bool = False,
    own_group: bool = False,
    redirects: Mapping[int, str | None] | None = None,
) -> Iterator[Process]:
    """The process while it runs; none of its descendants outlives the block. `redirects` is for a Forked one."""
    family = uuid.uuid4().hex
    # deepspeed's and torchrun's scripts look for their tools on PATH.
    path = {"PATH": f"{_BIN}{os.pathsep}{os.environ['PATH']}"}
    whole = {**os.environ, **path, **(env or {}), _FAMILY: family}
    command = command_line(arguments, ranks=ranks, launcher=launcher)
    process: Process
    if command[0] == "zeroinf" and "DS_ACCELERATOR" in os.environ:  # a fork knows of no other accelerator
        process = Forked(command, whole, stdin=stdin, own_group=own_group, redirects=redirects)
    else:
        process = subprocess.Popen(
            [sys.executable, "-m", *command] if command[0] == "zeroinf" else command,
            env=whole,
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0 if own_group else None,
        )
    try:
        yield process
    finally:
        below = list[psutil.Process]()
        with suppress(psutil.Error):
            below = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for member in below:
            with suppress(psutil.Error):
                member.kill()
        # By a mark in the environment: ranks whose launcher was killed are nobody's children.
        for member in psutil.process_iter():
            with suppress(psutil.Error):
                if member.environ().get(_FAMILY) == family:
                    member.kill()
        process.wait()


def rank_processes(process: Process) -> dict[int, psutil.Process]:
    """The ranks below a launcher, by number."""
    ranks = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.Error):
            if child.name().startswith(RANK_NAME):
                ranks[int(child.name().removeprefix(RANK_NAME))] = child
            elif "zeroinf" in child.cmdline()[1:5]:
                ranks[int(child.environ()["RANK"])] = child
    return ranks


def wait_until(condition: Callable[[], object], process: Process, *, seconds: float = 120) -> None:
    """Return once `condition()` holds; fail the test when it does not within `seconds` of `process` at work."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"it ended early, with {process.returncode}:\n{process.communicate()[1]}")
        if time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"waited in vain:\n{process.communicate()[1]}")
        time.sleep(0.05)


def journalled(journal: Path) -> list[dict[str, Any]]:
    """The results in a journal, in the order in which they came."""
    if not journal.is_file():
        return []
    return [record["result"] for _, record, _ in read_records(journal) if record and "result" in record]


def has_results(output: Path, count: int) -> bool:
    """Whether at least `count` results are in the journal of `output`."""
    return len(journalled(journal_path(output))) >= count


def write_jsonl(path: Path, entries: Sequence[Any]) -> Path:
    """One JSON value a line."""
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def changed(tmp_path: Path, changes: dict[str, str]) -> dict[str, str]:
    """An environment in which code runs behind the import of modules, by their names; `own` is the module.

    A new interpreter is told by its PYTHONPATH, a forked process, which has imported them, by `CHANGES`.
    """
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        f"""
import importlib.abc, importlib.machinery, os, sys

changes = {changes!r}

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in changes:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        def exec_module(own):
            execute(own)
            exec(changes[name], {{"own": own, "rank": os.environ.get("RANK")}})
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""
    )
    return {"PYTHONPATH": str(tmp_path / "site"), CHANGES: json.dumps(changes)}
