"""Servers that have names: where they are, whether they live, and how one is started in the background and stopped.

A server holds a lock on a file of its name for as long as it lives, so a record that a dead one has left is known for
what it is, and two servers never have one name.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from zeroinf.errors import EnvironmentProblem, UsageError, ZeroinfError
from zeroinf.jobs.files import is_held, rename, write_lines, write_new
from zeroinf.paths import cache_directory

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_POLL_S = 0.05
_KILL_S = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedServer:
    """A server that lives."""

    name: str
    pid: int
    model: str
    """What clients call the model."""
    address: str
    ready: bool
    """Its weights are loaded."""


class ServerFailedError(ZeroinfError):
    """A server that was started in the background ended before it was ready."""

    def __init__(self, message: str, exit_code: int, *, hint: str | None) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


def check_server_name(name: str) -> None:
    """Raises UsageError for a name that could not be a file's."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"--name {name!r}: letters, digits, and . _ - within", hint="as llama-70b")


def _file(name: str, ending: str) -> Path:
    check_server_name(name)
    return cache_directory() / "servers" / f"{name}.{ending}"


def _writable(name: str, ending: str) -> Path:
    """The same, once the folder is there and takes it. Raises EnvironmentProblem where it does not."""
    file = _file(name, ending)
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file.touch()
    except OSError as error:
        raise EnvironmentProblem(
            f"a name cannot be kept in {file.parent}: {error.strerror}", hint="set ZEROINF_CACHE to another folder"
        ) from error
    return file


@contextmanager
def holding_name(name: str) -> Iterator[None]:
    """This process is the server of that name within the block. Raises UsageError where another one is."""
    lock = _writable(name, "lock")
    with lock.open("a") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"a server named {name} runs already", hint=f"zeroinf stop {name}") from None
        try:
            yield
        finally:
            _file(name, "json").unlink(missing_ok=True)


def announce(server: NamedServer) -> None:
    """Let others find this process, which holds its name."""
    made = _file(server.name, "json.new")
    write_new(made, write_lines([json.dumps(asdict(server))]))
    rename(made, _file(server.name, "json"))


def find_server(name: str) -> NamedServer | None:
    """The server of that name, if one lives and listens."""
    lock, record = _file(name, "lock"), _file(name, "json")
    with suppress(FileNotFoundError):
        if is_held(lock):
            return NamedServer(**json.loads(record.read_text()))
    return None


def all_servers() -> list[NamedServer]:
    """The servers of this user that live, by name."""
    found = (find_server(each.stem) for each in sorted((cache_directory() / "servers").glob("*.json")))
    return [server for server in found if server is not None]


def the_server(name: str) -> NamedServer:
    """Raises UsageError where none of that name lives."""
    if (found := find_server(name)) is None:
        raise UsageError(f"no server named {name} runs here", hint="zeroinf ps lists those that do")
    return found


def stop_server(name: str, grace_s: float | None = None) -> None:
    """Let a server end what is under way, and wait until it is gone; after `grace_s` seconds end it at once.

    Raises UsageError where there is none of that name.
    """
    server, lock, asked = the_server(name), _file(name, "lock"), time.monotonic()
    os.kill(server.pid, signal.SIGTERM)
    while is_held(lock):
        waited = time.monotonic() - asked
        if grace_s is not None and waited > grace_s:
            with suppress(ProcessLookupError):
                os.kill(server.pid, signal.SIGKILL if waited > grace_s + _KILL_S else signal.SIGTERM)
        time.sleep(_POLL_S)


def start_in_background(name: str, arguments: Sequence[str], env: Mapping[str, str] | None = None) -> NamedServer:
    """Start `zeroinf serve ARGUMENTS --name NAME` as a process of its own, and wait until it is ready.

    Raises UsageError where one of that name runs already, and ServerFailedError with the last error and exit code of a
    server that ends before it is ready.
    """
    if find_server(name) is not None:
        raise UsageError(f"a server named {name} runs already", hint=f"zeroinf stop {name}")
    log = _writable(name, "log")
    whole = {key: value for key, value in {**os.environ, **(env or {})}.items() if key != "ZEROINF_SERVE_DETACH"}
    whole["PYTHONPATH"] = os.pathsep.join(each for each in sys.path if each)
    with log.open("w") as told:
        child = subprocess.Popen(
            [sys.executable, "-m", "zeroinf", "serve", *arguments, "--name", name],
            stdin=subprocess.DEVNULL,
            stdout=told,
            stderr=told,
            env=whole,
            start_new_session=True,
        )
    while True:
        code = child.poll()
        server = find_server(name)
        if code is not None:
            raise _failure(name, log, code)
        if server is not None and server.ready and server.pid == child.pid:
            return server
        time.sleep(_POLL_S)


def _failure(name: str, log: Path, code: int) -> ServerFailedError:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = next((line.partition(": ")[2] for line in reversed(lines) if line.startswith(("error:", "Error:"))), None)
    hint = next((line.partition(": ")[2] for line in reversed(lines) if line.startswith("hint:")), None)
    why = said or (lines[-1] if lines else "without a word")
    exit_code = code if code > 0 else 128 - code
    return ServerFailedError(f"server {name} ended: {why}", exit_code or 1, hint=hint or f"its log is {log}")
