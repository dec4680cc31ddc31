"""Supervises the process that runs the model on a node, for the driver of a cluster's run.

One supervisor is one Ray actor, on one node, with all of its GPUs. The model is never loaded in the actor itself: when
the process dies, its exit code and its last words are still there to be told.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from zeroinf.ray.messages import NodeEvent, NodeFailed, NodeSpec
from zeroinf.service.requests import Work

_LAST_WORDS = 20
_END_S = 3.0


class NodeSupervisor:
    """Starts the node's process; `exchange` gives it requests and takes what came of earlier ones."""

    module = "zeroinf.ray.worker"

    def __init__(self, spec: NodeSpec) -> None:
        path = os.pathsep.join(each for each in sys.path if each)
        environ = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # Ray's: one thread
        # DeepSpeed looks for ninja on PATH; it lies beside this Python.
        environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), environ.get("PATH", "")))
        self._process = subprocess.Popen(
            [sys.executable, "-m", self.module],
            env={**environ, **spec.environ, "PYTHONPATH": path},
            cwd=spec.folder if spec.folder.is_dir() else None,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._events: list[NodeEvent] = []
        self._changed = threading.Condition()
        self._words: deque[str] = deque(maxlen=_LAST_WORDS)
        self._is_closing = False
        self._send(spec)
        self._listener = threading.Thread(target=self._listen, name="errors", daemon=True)
        self._listener.start()
        threading.Thread(target=self._receive, name="events", daemon=True).start()

    def exchange(self, draw: Sequence[Work], wait_s: float, linger_s: float) -> list[NodeEvent]:
        """Let `draw` be completed, and wait up to `wait_s` for events of whatever is under way; once there is one,
        others of the next `linger_s` are waited for."""
        if draw:
            self._send(draw)
        with self._changed:
            self._changed.wait_for(lambda: self._events, wait_s)
        time.sleep(linger_s)
        with self._changed:
            events, self._events = self._events, []
        return events

    def close(self) -> None:
        """End the process: in order, if it does so within a few seconds."""
        self._is_closing = True
        self._send(None)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        self._process.kill()
        self._process.wait()

    def _send(self, message: object) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has died, and its end is told as an event
            pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()

    def _receive(self) -> None:
        """Take events until the process ends, and tell of its end."""
        assert self._process.stdout is not None
        has_failed = False
        with suppress(EOFError, pickle.UnpicklingError):
            while True:
                event: NodeEvent = pickle.load(self._process.stdout)
                has_failed = has_failed or isinstance(event, NodeFailed)
                self._tell(event)
        code = self._process.wait()
        self._listener.join(1.0)
        if not has_failed and not self._is_closing:
            self._tell(NodeFailed(message=_end_of(code, self._words), exit_code=code if code > 0 else 128 - code))

    def _tell(self, event: NodeEvent) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()

    def _listen(self) -> None:
        """Pass on what the process says, into Ray's log of this actor, and keep its last words."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            text = line.decode(errors="replace").rstrip()
            sys.stderr.write(text + "\n")
            if text:
                self._words.append(text)


def _end_of(code: int, words: Sequence[str]) -> str:
    """The end of a process in words, by its exit code and its last lines."""
    how = "its process ended"
    if code < 0:
        how = f"its process was killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += " (out of host memory? see the node's system log)"
    return how + (f"; its last words: {words[-1]}" if words else "")
