"""`zeroinf` in a process of its own that is forked from one which has imported everything.

Imports are nine tenths of what a short run takes of a core. Behind them all is the command's own: arguments,
environment, standard streams, signals and exit code.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

_IMPORTED = (
    "deepspeed",
    "zeroinf.cli.run",
    "zeroinf.cli.console",
    "zeroinf.cli.eval",
    "zeroinf.engines.registry",
    "transformers.models.llama.modeling_llama",
)

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(list(_IMPORTED))


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
        given, self._given = _server.Pipe(duplex=False)
        self._out, out = _server.Pipe(duplex=False)
        self._err, err = _server.Pipe(duplex=False)
        settings = (list(command), dict(env), Path.cwd(), own_group, dict(redirects or {}))
        self._process = _server.Process(target=_run, args=(*settings, given, out, err))
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
    os.environ.clear()
    os.environ.update(env)
    from zeroinf.cli.main import main

    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  # multiprocessing's is empty
    for number, name in redirects.items():
        _redirect(number, name)
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
