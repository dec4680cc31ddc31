"""Runs the model on one node: a process that completes requests which come over its standard input.

It is started by `NodeSupervisor`. Input: a pickled `NodeSpec`, then lists of `Work`; None or the end of
the input ends it. Output: pickled events. Whatever libraries print goes to standard error.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, BinaryIO

from zeroinf.compat.imports import quicken_imports
from zeroinf.errors import EnvironmentProblem, ZeroinfError
from zeroinf.hardware.process import process_age_s
from zeroinf.paths import cache_directory
from zeroinf.planner.summary import plan_lines
from zeroinf.ray.messages import NodeEvent, NodeFailed, NodeNote, NodeReady, NodeResults, NodeSpec
from zeroinf.ray.node import ranks_here, within_ray
from zeroinf.runs.progress import ProgressObserver
from zeroinf.service.requests import Result, Work

if TYPE_CHECKING:
    from zeroinf.runs.session import Session
    from zeroinf.service.handles import Handle

_TELL_EVERY_S = 0.5
_END_S = 8.0
"""How long the model may take to close; what is left of the process then ends as it is."""
Send = Callable[[NodeEvent], None]


def main() -> int:
    """Work until the input ends; the process's exit code."""
    events = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    lock = threading.Lock()

    def send(event: NodeEvent) -> None:
        with lock:
            pickle.dump(event, events)
            events.flush()

    is_ready = False
    try:
        spec: NodeSpec = pickle.load(sys.stdin.buffer)
        with _open(spec, send) as session:
            is_ready = True
            _serve(session, sys.stdin.buffer, send)
    except BrokenPipeError:  # whoever started this process is gone
        return 1
    except Exception as error:
        send(NodeFailed.of(error, is_final=isinstance(error, ZeroinfError) and not is_ready))
        if not isinstance(error, ZeroinfError):
            raise
        return error.exit_code
    return 0


def _open(spec: NodeSpec, send: Send) -> Session:
    """The loaded model. Raises what a run raises before its first token."""
    quicken_imports(cache_directory())
    from zeroinf.ray.facts import node_facts
    from zeroinf.runs.session import open_session

    options = within_ray(spec.options)
    _check_facts(spec.facts, node_facts(options))
    session = open_session(options, spec.lengths, spec.requests, _Notes(send), ranks_here())
    plan = session.plan
    how = next(iter(plan_lines(plan)))
    send(NodeReady(capacity=plan.batch_size * plan.streams, load_s=process_age_s(), plan=how))
    return session


def _check_facts(wanted: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raise EnvironmentProblem where completions of this node would not be those of the others."""
    if other := [name for name in wanted if found.get(name) != wanted[name]]:
        told = ", ".join(f"{name} is {found.get(name)}, there it is {wanted[name]}" for name in other)
        raise EnvironmentProblem(
            f"not as where the job was started: {told}",
            hint="install the same versions on all nodes, and give them the same files of the model",
        )


def _serve(session: Session, source: BinaryIO, send: Send) -> None:
    """Submit what comes, and send what comes of it."""
    finished: SimpleQueue[int | None] = SimpleQueue()
    held: dict[int, tuple[Work, Handle]] = {}
    failures: list[BaseException] = []

    def receive() -> None:
        try:
            while (draw := _next_draw(source)) is not None:
                for work in draw:
                    handle = session.service.submit(work.prompt, work.sampling, priority="batch", index=work.index)
                    held[work.index] = work, handle
                    handle.when_changed(partial(finished.put, work.index))
        except BaseException as error:
            failures.append(error)
        finished.put(None)
        time.sleep(_END_S)
        os._exit(1)

    threading.Thread(target=receive, name="receive", daemon=True).start()
    told = 0
    while True:
        indices = _next_of(finished, _TELL_EVERY_S)
        results = [_result(session, *held.pop(index)) for index in indices if index is not None]
        tokens = session.service.tokens
        if results or tokens > told:
            send(NodeResults(results=results, tokens=tokens))
            told = tokens
        if None in indices:
            if failures:
                raise failures[0]
            return


def _next_draw(source: BinaryIO) -> Sequence[Work] | None:
    try:
        draw: Sequence[Work] | None = pickle.load(source)
    except EOFError:
        return None
    return draw


def _next_of(finished: SimpleQueue[int | None], wait_s: float) -> list[int | None]:
    """Everything that is in the queue, once there is something."""
    found: list[int | None] = []
    try:
        found.append(finished.get(timeout=wait_s))
        while True:
            found.append(finished.get_nowait())
    except Empty:
        return found


def _result(session: Session, work: Work, handle: Handle) -> Result:
    """Raises the error with which the model failed."""
    return session.result(handle.result(), work)


class _Notes(ProgressObserver):
    """Sends notes to the driver, and shows nothing."""

    def __init__(self, send: Send) -> None:
        super().__init__(shown=False)
        self._send = send

    def note(self, text: str) -> None:
        self._send(NodeNote(text))

    failed = note


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)
