"""A server from start to end: its address is taken first, then the model is loaded, and what is under way ends it.

HTTP is answered by a thread of its own, so that health can be asked for while weights load, and signals come to the
main thread, which loads the model and closes it.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from zeroinf.errors import InterruptedRunError, UsageError
from zeroinf.generation.row import MOST_LOGPROBS
from zeroinf.jobs.files import make_folder
from zeroinf.jobs.output import Job
from zeroinf.model.anatomy import Anatomy
from zeroinf.model.source import ModelSource
from zeroinf.options.options import RunOptions
from zeroinf.paths import open_lock
from zeroinf.planner.workload import Lengths
from zeroinf.runs.prepare import read_job
from zeroinf.runs.session import open_session
from zeroinf.serve.app import make_app
from zeroinf.serve.batch_routes import add_batches, add_no_batches
from zeroinf.serve.batches import Batches, ReadJob
from zeroinf.serve.files import FileStore
from zeroinf.serve.gateway import Gateway
from zeroinf.serve.lengths import planned_lengths
from zeroinf.serve.named import NamedServer, announce, holding_name
from zeroinf.serve.page_routes import add_page
from zeroinf.serve.settings import Settings
from zeroinf.service.observer import Observer
from zeroinf.signals import heeded_signals

_PROMPT_TOKENS = 2048
"""Longest prompt where nothing is said of it."""
_POLL_S = 0.2
_CLOSE_S = 5


def bind(settings: Settings) -> socket.socket:
    """A socket that listens where `settings` say. Raises UsageError where another program does, or nobody can."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(512)
    except OSError as error:
        listener.close()
        raise UsageError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}",
            hint="choose another --port; 0 takes any that is free",
        ) from error
    return listener


@contextmanager
def answering(app: FastAPI, listener: socket.socket) -> Iterator[str]:
    """Answer HTTP in a thread until the block ends; gives the address. What is still under way then is cut off."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=_CLOSE_S,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), name="zeroinf-http", daemon=True)
    thread.start()
    try:
        yield address_of(listener)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def address_of(listener: socket.socket) -> str:
    """The address at which a server can be reached from this machine."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_server(
    settings: Settings,
    options: RunOptions,
    max_prompt_tokens: int | None,
    scores_prompts: bool,
    num_gpus: int | None,
    observer: Observer,
    name: str | None,
    listening: Callable[[str], None],
    ready: Callable[[str], None],
) -> None:
    """Serve until a signal ends it, found by others as `name`.

    `listening` and `ready` are told the address, before and after weights are loaded.

    Raises what loading raises, InterruptedRunError for a signal before the model is there, and the error with which the
    model failed.
    """
    signals = _Signals()
    with ExitStack() as closing:
        closing.callback(signals.restore)
        if name is not None:
            closing.enter_context(holding_name(name))
        gateway = Gateway(settings, options.sampling)
        app = make_app(gateway, add_page)
        batches = closing.enter_context(_state(app, gateway)) if settings.state is not None else None
        if batches is None:
            add_no_batches(app)
        listener = bind(settings)
        address = closing.enter_context(answering(app, listener))
        listening(address)
        _announce(name, settings, address, ready=False)
        lengths = partial(_lengths, options, max_prompt_tokens, scores_prompts)
        session = open_session(options, lengths, None, observer, num_gpus)
        closing.callback(session.close)
        with signals.noted():
            gateway.open(session.service)
            if batches is not None:
                batches.start(session.service, job_reader(options, session.source, session.model.device.type))
                closing.callback(batches.stop)
            _announce(name, settings, address, ready=True)
            ready(address)
            while not signals.count and gateway.state == "ready":
                signals.wait(_POLL_S)
            failed = gateway.why
            _drain(gateway, signals)
        session.service.check()
        if failed is not None:
            raise failed


def _announce(name: str | None, settings: Settings, address: str, *, ready: bool) -> None:
    if name is not None:
        announce(NamedServer(name=name, pid=os.getpid(), model=settings.model_name, address=address, ready=ready))


@contextmanager
def _state(app: FastAPI, gateway: Gateway) -> Iterator[Batches]:
    """Files and batches in the folder of the server, which one server holds at a time. Raises UsageError."""
    settings = gateway.settings
    assert settings.state is not None
    try:
        make_folder(settings.state, 0o700)
        lock = open_lock(settings.state / "lock")
    except OSError as error:
        raise UsageError(f"--state {settings.state}: {error.strerror}", hint="name a folder of your own") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UsageError(f"another server uses --state {settings.state}", hint="name another folder") from None
    try:
        files = FileStore(settings.state / "files", settings.max_state_bytes)
        batches = Batches(settings.state / "batches", files, gateway)
        add_batches(app, gateway, files, batches)
        yield batches
    finally:
        os.close(lock)


def job_reader(options: RunOptions, source: ModelSource, device: str) -> ReadJob:
    """Reads jobs of batches as `zeroinf run` would with these options."""

    def read(input_file: Path, output_file: Path, model: str) -> Job:
        own = replace(
            options,
            input_files=(str(input_file),),
            input_format="jsonl",
            output_file=output_file,
            output_format="openai",
            resume=True,
        )
        return replace(read_job(own, source, device).job, model=model)

    return read


def _lengths(
    options: RunOptions, prompt_tokens: int | None, scores_prompts: bool, source: ModelSource, anatomy: Anatomy
) -> Lengths:
    """The lengths that memory is planned for."""
    return planned_lengths(
        anatomy,
        prompt_tokens=prompt_tokens,
        most_prompt_tokens=_PROMPT_TOKENS,
        new_tokens=options.sampling.max_new_tokens,
        logprobs=MOST_LOGPROBS,
        rows=options.batch_size,
        scores_prompts=scores_prompts,
        max_model_len=options.max_model_len,
    )


def _drain(gateway: Gateway, signals: _Signals) -> None:
    """Let what is under way come to its end; a second signal, or the time for it, cuts it short."""
    asked, until = signals.count, time.monotonic() + gateway.settings.drain_s
    gateway.drain()
    while gateway.under_way and signals.count == asked and time.monotonic() < until:
        signals.wait(_POLL_S)
    gateway.cancel_all()


class _Signals:
    """Stop signals, while it lives: at first they raise InterruptedRunError, within `noted` they are counted."""

    def __init__(self) -> None:
        self.count = 0
        self._is_noted = False
        self._came = threading.Event()
        self._previous = {number: signal.signal(number, self._handle) for number in heeded_signals()}

    def _handle(self, number: int, frame: object) -> None:
        if not self._is_noted:
            raise InterruptedRunError("stopped before the model was loaded", signal_number=number)
        self.count += 1
        self._came.set()

    @contextmanager
    def noted(self) -> Iterator[None]:
        self._is_noted = True
        try:
            yield
        finally:
            self._is_noted = False

    def wait(self, most_s: float) -> None:
        """Until one comes."""
        self._came.wait(most_s)
        self._came.clear()

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
