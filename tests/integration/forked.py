"""`zeroinf` in a process of its own that is forked from one which has imported everything.

Imports are nine tenths of what a short run takes of a core. Behind them all is the command's own: arguments,
environment, standard streams, signals and exit code. Ranks that it starts are forked from it, in sessions of their own.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

_IMPORTED = (
    "deepspeed",
    "zeroinf.cli.run",
    "zeroinf.cli.console",
    "zeroinf.cli.chat",
    "zeroinf.cli.eval",
    "zeroinf.cli.serve",
    "zeroinf.serve.server",
    "zeroinf.engines.loading",
    "transformers.models.llama.modeling_llama",
)

RANK_NAME = "zeroinf-rank-"
"""What the name of a rank's process begins with, before its number."""

CHANGES = "TEST_CHANGES"
"""In the environment: JSON of code that changes modules, by their names."""
_PR_SET_NAME = 15

SERVER = multiprocessing.get_context("forkserver")
"""Forks a process that has imported everything."""
SERVER.set_forkserver_preload(list(_IMPORTED))


class Forked:
    """A process, with the part of `subprocess.Popen` that tests use."""

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        *,
        stdin: bool,
        own_group: bool,
        redirects: Mapping[int, str | None] | None = None,
    ) -> None:
        """`redirects` says of standard streams, by number, which file takes the place of the pipe; None closes it."""
        given, self._given = SERVER.Pipe(duplex=False)
        self._out, out = SERVER.Pipe(duplex=False)
        self._err, err = SERVER.Pipe(duplex=False)
        settings = (list(command), dict(env), Path.cwd(), own_group, dict(redirects or {}))
        self._process = SERVER.Process(target=_run, args=(*settings, given, out, err))
        self._process.start()
        for end in (given, out, err, *(() if stdin else (self._given,))):
            end.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("zeroinf", timeout or 0)
        return self._process.exitcode

    def communicate(self, text: str | None = None, timeout: float | None = None) -> tuple[str, str]:
        with ThreadPoolExecutor(2) as pool:
            told = [pool.submit(_read_all, end) for end in (self._out, self._err)]
            if text is not None:
                os.write(self._given.fileno(), text.encode())
                self._given.close()
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()  # which ends both readers
                raise
            out, err = (each.result() for each in told)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _read_all(end: Connection) -> str:
    with os.fdopen(os.dup(end.fileno()), encoding="utf-8", errors="replace") as file:
        return file.read()


def _run(
    command: Sequence[str],
    env: Mapping[str, str],
    folder: Path,
    own_group: bool,
    redirects: Mapping[int, str | None],
    given: Connection,
    out: Connection,
    err: Connection,
) -> None:
    """What `python -m zeroinf` does, in the place of this process."""
    if own_group:
        os.setpgid(0, 0)
    for end, number in ((given, 0), (out, 1), (err, 2)):
        os.dup2(end.fileno(), number)
        end.close()
    os.chdir(folder)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  # multiprocessing's is empty
    for number, name in redirects.items():
        _redirect(number, name)
    subprocess.Popen = _Popen  # type: ignore[misc]
    _be_zeroinf(command, env)


def _be_zeroinf(command: Sequence[str], env: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    for name, code in json.loads(env.get(CHANGES, "{}")).items():
        exec(code, {"own": importlib.import_module(name), "rank": env.get("RANK")})
    from zeroinf.cli.main import main

    sys.argv = list(command)
    try:
        main()
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


def _redirect(number: int, name: str | None) -> None:
    """What a shell does for `>NAME` and `>&-`, and an interpreter that starts behind it."""
    if name is None:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)
        return
    opened = os.open(name, (os.O_WRONLY if number else os.O_RDONLY) | os.O_NOCTTY)
    os.dup2(opened, number)
    os.close(opened)


class _Popen(subprocess.Popen[Any]):
    """Forks this process where a rank would be started."""

    def __new__(cls, command: Any, *more: Any, **how: Any) -> Any:
        if tuple(command[:4]) == (sys.executable, "-u", "-m", "zeroinf"):
            return _ForkedRank(command[3:], how["env"])
        return super().__new__(cls)


class _ForkedRank:
    """A rank, with the part of `subprocess.Popen` that its launcher uses."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._code: int | None = None
        _flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            for number in signal.valid_signals():
                if callable(signal.getsignal(number)):
                    signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            ctypes.CDLL(None).prctl(_PR_SET_NAME, f"{RANK_NAME}{env['RANK']}".encode())
            _end_as_interpreters_do(lambda: _be_zeroinf(command, env))

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _end_as_interpreters_do(body: Callable[[], None]) -> NoReturn:
    code = 1
    try:
        body()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        _flush()
        os._exit(code)


def _flush() -> None:
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with suppress(OSError):  # a display that is full or gone
            stream.flush()
