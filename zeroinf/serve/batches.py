"""Batches that survive: each is a job of `zeroinf run` with a journal, whose requests ride beside interactive ones.

A batch's folder holds its input, its record and its journal. One thread reads inputs and tokenizes them, another one
submits requests, a few more than the model has room for, in turns among batches, and journals what comes of them.
A server that is killed goes on where it was: what is in the journal is not done again.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Literal

from zeroinf.errors import ZeroinfError
from zeroinf.jobs.files import make_folder, rename, write_lines, write_new
from zeroinf.jobs.journal_output import JournalOutput
from zeroinf.jobs.output import Job
from zeroinf.jobs.output_files import errors_path
from zeroinf.runs.queue import in_running_order
from zeroinf.serve.batch_records import Batch, Status, check_input, new_batch
from zeroinf.serve.errors import ApiError
from zeroinf.serve.files import FileStore
from zeroinf.serve.gateway import Gateway, check_room
from zeroinf.service.core import Asked, Service
from zeroinf.service.handles import Handle
from zeroinf.service.requests import Extra, Refusal, Result, Work
from zeroinf.service.results import result_of

_TICK_S = 0.5
_AHEAD = 2
"""Requests of batches under way, of those that the model has room for: the next ones wait beside it."""
_UNFINISHED = ".new"
_INPUT, _OUTPUT = "input.jsonl", "output.jsonl"
_WORDS = {"cancelled": "the batch was cancelled before it ran", "expired": "the batch's time was over before it ran"}

ReadJob = Callable[[Path, Path, str], Job]
"""The job of an input file whose output shall be the second one, for what clients call the model."""


@dataclass(eq=False)
class _Running:
    """A batch whose requests are under way."""

    id: str
    job: Job
    output: JournalOutput
    left: deque[int]
    """Indices of requests that are to be submitted, in their order."""
    under_way: dict[Handle, Work] = field(default_factory=dict)
    choices: Counter[str] = field(default_factory=Counter)
    """Completions that an entry still lacks, by its id."""
    answered: set[str] = field(default_factory=set)
    """Entries that have a completion, of those that lack others."""
    ended: list[int] = field(default_factory=lambda: [0, 0])
    """Entries that were completed and that failed, of which clients do not know yet."""
    durable: int = 0
    """Results that the journal kept durably when clients were last told."""
    missing: list[int] = field(default_factory=list)
    """Indices of requests that will not run."""
    ending: Literal["completed", "cancelled", "expired"] = "completed"


class Batches:
    """The batches below `folder`, from any thread. `start` begins to run them."""

    def __init__(self, folder: Path, files: FileStore, gateway: Gateway) -> None:
        self._folder, self._files, self._gateway = folder, files, gateway
        self._lock = threading.Lock()
        self._batches: dict[str, Batch] = {}
        self._running: dict[str, _Running] = {}
        self._to_prepare: SimpleQueue[str | None] = SimpleQueue()
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._is_stopping = False
        self._threads: list[threading.Thread] = []
        make_folder(folder)
        for each in sorted(folder.iterdir()):
            if each.name.endswith(_UNFINISHED):
                shutil.rmtree(each)
            else:
                self._batches[each.name] = Batch.load(each)

    # What clients ask for.

    def create(self, body: dict[str, Any]) -> Batch:
        """A new batch, which is validated next. Raises ApiError."""
        batch = new_batch(body, self._gateway.settings.model_name)
        file = self._files.get(batch.input_file_id)
        if file.purpose != "batch":
            raise ApiError(400, f"file {file.id} has the purpose {file.purpose!r}, not 'batch'", param="input_file_id")
        made = self._folder / f"{batch.id}{_UNFINISHED}"
        try:
            made.mkdir()
            os.link(self._files.content(file.id), made / _INPUT)
            batch.save(made)
            rename(made, self._folder / batch.id)
        except OSError as error:
            shutil.rmtree(made, ignore_errors=True)
            raise ApiError(507, f"the server cannot keep the batch: {error.strerror}") from error
        with self._lock:
            self._batches[batch.id] = batch
        self._to_prepare.put(batch.id)
        return batch

    def get(self, batch_id: str) -> Batch:
        """Raises ApiError where there is none of that id."""
        with self._lock:
            if (found := self._batches.get(batch_id)) is None:
                raise ApiError(404, f"there is no batch {batch_id!r}")
            return found

    def all(self) -> Sequence[Batch]:
        """All, the newest first."""
        with self._lock:
            found = list(self._batches.values())
        return sorted(found, key=lambda batch: (batch.created_at, batch.id), reverse=True)

    def cancel(self, batch_id: str) -> Batch:
        """Let it end with what it has come to. Raises ApiError where it is over."""
        with self._lock:
            batch = self._batches.get(batch_id)
            if batch is not None and batch.status in ("validating", "in_progress"):
                batch = self._set(batch, status="cancelling", cancelling_at=int(time.time()))
                self._inbox.put(lambda: self._end(batch_id, "cancelled"))
                return batch
        batch = self.get(batch_id)
        if batch.status == "cancelling":
            return batch
        raise ApiError(400, f"batch {batch_id} is {batch.status}: it cannot be cancelled")

    # What runs them.

    def start(self, service: Service, read_job: ReadJob) -> None:
        """Go on with those that are not over, and take up new ones as they come."""
        for batch in reversed(self.all()):
            if not batch.is_over:
                self._to_prepare.put(batch.id)
        self._threads = [
            threading.Thread(target=self._prepare_all, args=(service, read_job), name="zeroinf-read", daemon=True),
            threading.Thread(target=self._run, args=(service,), name="zeroinf-batches", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Leave all as it is on disk; the next server goes on with it."""
        self._is_stopping = True
        self._to_prepare.put(None)
        for thread in self._threads:
            thread.join()

    def _set(self, batch: Batch, **changes: Any) -> Batch:
        """To be called with the lock held. Clients are told what is on the disk. Raises OSError."""
        changed = replace(self._batches[batch.id], **changes)
        changed.save(self._folder / batch.id)
        self._batches[batch.id] = changed
        return changed

    def _change(self, batch_id: str, status: Status, **changes: Any) -> None:
        with self._lock:
            self._set(self._batches[batch_id], status=status, **{f"{status}_at": int(time.time()), **changes})

    def _prepare_all(self, service: Service, read_job: ReadJob) -> None:
        while (batch_id := self._to_prepare.get()) is not None and not self._is_stopping:
            try:
                running = self._prepare(batch_id, service, read_job)
            except Exception as error:
                known = isinstance(error, ZeroinfError | OSError)
                if not known:
                    logging.getLogger(__name__).exception("batch %s", batch_id)
                why = str(error) if known else "the server failed to read it; its log says more"
                try:
                    self._fail(batch_id, [{"code": "failed", "line": None, "message": why, "param": None}])
                except OSError as full:  # the next server goes on with it
                    self._gateway.fail(full)
                    return
                continue
            if running is not None:
                self._inbox.put(lambda running=running: self._begin(running))  # type: ignore[misc]

    def _fail(self, batch_id: str, errors: list[dict[str, Any]]) -> None:
        self._change(batch_id, "failed", errors=errors)

    def _prepare(self, batch_id: str, service: Service, read_job: ReadJob) -> _Running | None:
        batch, folder = self.get(batch_id), self._folder / batch_id
        total, errors = check_input(folder / _INPUT, batch.endpoint)
        if errors:
            self._fail(batch_id, errors)
            return None
        job = self._runnable(service, read_job(folder / _INPUT, folder / _OUTPUT, batch.model))
        output = JournalOutput(folder / _OUTPUT, job, overwrite=False, resume=True, resume_anyway=False)
        output.begin(service.model.control.world.size)
        running = _Running(batch_id, job, output, deque(in_running_order(output.left, service.model.plan).indices))
        running.choices.update(work.id for work in output.left)
        running.durable = output.settle()
        left = set(output.left.indices)
        answered = {work.id for work in job.work if work.index not in left and work.index not in output.failed}
        running.answered = answered & running.choices.keys()
        completed = len(answered) - len(running.answered)
        failed = len({work.id for work in job.work} - running.choices.keys()) - completed
        refused = {refusal.id for refusal in job.refusals}
        with self._lock:
            begun: dict[str, Any] = {} if batch.in_progress_at else {"in_progress_at": int(time.time())}
            if self._batches[batch_id].status == "validating":
                begun["status"] = "in_progress"
            self._set(batch, total=total, completed=completed, failed=failed + len(refused), **begun)
        return running

    def _runnable(self, service: Service, job: Job) -> Job:
        """`job` without what this server cannot run; one refusal for an entry."""
        served, runnable, refusals = self._gateway.settings.model_name, list[int](), list(job.refusals)
        for at, (item, extra) in enumerate(job.work.with_extras()):
            named = (extra or Extra()).model
            reason = None if named in (None, served) else f"there is no model {named!r}: this server has {served!r}"
            with suppress(ApiError):
                check_room(service, len(item.prompt), item.sampling)
                if reason is None:
                    runnable.append(at)
                    continue
            if reason is None:
                reason = _too_long(service, item)
            refusals.append(Refusal.of(item, reason))
        once = {refusal.id or f"line {refusal.line}": refusal for refusal in reversed(refusals)}
        plan = service.model.plan
        return replace(
            job,
            work=job.work.selected(runnable),
            refusals=tuple(sorted(once.values(), key=lambda refusal: refusal.index)),
            fingerprint={**job.fingerprint, "longest": f"{plan.prompt_tokens} and {plan.new_tokens} tokens"},
        )

    def _begin(self, running: _Running) -> None:
        self._running[running.id] = running
        if self.get(running.id).cancelling_at is not None:
            self._end(running.id, "cancelled")
        elif not running.left:
            self._finish(running)

    def _end(self, batch_id: str, how: Literal["cancelled", "expired"]) -> None:
        """Let nothing more of it begin."""
        running = self._running.get(batch_id)
        if running is None:  # it is read still
            return
        running.ending = how
        running.missing += running.left
        running.left.clear()
        for handle in running.under_way:
            handle.cancel()
        if not running.under_way:
            self._finish(running)

    def _run(self, service: Service) -> None:
        try:
            while not self._is_stopping:
                with suppress(Empty):
                    self._inbox.get(timeout=_TICK_S)()
                    while True:
                        self._inbox.get_nowait()()
                self._expire()
                self._refill(service)
                for running in self._running.values():
                    if (durable := running.output.settle()) > running.durable:
                        running.durable = durable
                        self._tell_counts(running)
            self._leave()
        except Exception as error:
            self._gateway.fail(error)  # a disk that is full, or the model: nothing of a batch is lost
            for running in self._running.values():
                running.output.abandon("the server failed")

    def _expire(self) -> None:
        now = time.time()
        for running in tuple(self._running.values()):
            if running.ending == "completed" and now > self.get(running.id).expires_at:
                self._end(running.id, "expired")

    def _refill(self, service: Service) -> None:
        """Submit requests, one of each batch in turn, until enough are under way."""
        plan = service.model.plan
        most = _AHEAD * plan.batch_size * plan.streams
        under_way = sum(len(running.under_way) for running in self._running.values())
        waiting = deque(running for running in self._running.values() if running.left)
        taken: list[tuple[_Running, Work]] = []
        while waiting and under_way + len(taken) < most:
            running = waiting.popleft()
            taken.append((running, running.job.work.at(running.left.popleft())))
            if running.left:
                waiting.append(running)
        asked = [Asked(work.prompt, work.sampling, work.index) for _, work in taken]
        for (running, work), handle in zip(taken, service.submit_all(asked, priority="batch"), strict=True):
            running.under_way[handle] = work
            handle.when_changed(lambda running=running, handle=handle: self._heard(running, handle))  # type: ignore[misc]
        under_way += len(taken)
        self._gateway.batch_requests = under_way + sum(len(running.left) for running in self._running.values())

    def _heard(self, running: _Running, handle: Handle) -> None:
        self._inbox.put(lambda: self._take(running, handle))

    def _take(self, running: _Running, handle: Handle) -> None:
        """Journal what a request came to."""
        if not handle.done or (work := running.under_way.pop(handle, None)) is None:
            return
        found = handle.result(0)
        if found.finish_reason != "cancelled":
            assert self._gateway.model is not None
            result = result_of(work, found, self._gateway.model.codec)
            running.output.add(result)
            self._gateway.metrics.batch_done(len(work.prompt), result.completion_tokens, found.finish_reason)
            self._count(running, work, result)
        else:
            running.missing.append(work.index)
        if not (running.left or running.under_way) and not self._is_stopping:
            self._finish(running)

    def _count(self, running: _Running, work: Work, result: Result) -> None:
        running.choices[work.id] -= 1
        if not result.failed:
            running.answered.add(work.id)
        if not running.choices[work.id]:
            running.ended[work.id not in running.answered] += 1
            running.answered.discard(work.id)

    def _tell_counts(self, running: _Running) -> None:
        """Let clients, and the next server, know how many entries have ended since the last call. All of it is durable,
        so that counts never fall."""
        completed, failed = running.ended
        if completed or failed:
            running.ended = [0, 0]
            with self._lock:
                batch = self._batches[running.id]
                self._set(batch, completed=batch.completed + completed, failed=batch.failed + failed)

    def _finish(self, running: _Running) -> None:
        """Publish what there is. It may be done again after a crash, with the same outcome."""
        del self._running[running.id]
        folder, ending = self._folder / running.id, running.ending
        self._change(running.id, "finalizing")
        lacking = {running.job.work.at(index).id for index in running.missing}
        if lacking:
            running.output.abandon(ending)
            done = [at for at, work in enumerate(running.job.work) if work.id not in lacking]
            if done:
                job = replace(running.job, work=running.job.work.selected(done))
                output = JournalOutput(folder / _OUTPUT, job, overwrite=False, resume=True, resume_anyway=False)
                output.begin(1)
                output.finish()
        else:
            running.output.finish()
        self._publish(running.id, folder, ending, lacking)

    def _publish(self, batch_id: str, folder: Path, ending: Status, missing: set[str]) -> None:
        """Give out the output and the errors as files, and say that the batch is over."""
        done, spent = set[str](), Counter[str]()
        for text in _lines_of(folder / _OUTPUT):
            line = json.loads(text)
            done.add(line["custom_id"])
            spent.update({name: line["response"]["body"]["usage"][name] for name in _USAGE})
        errors = _error_lines(errors_path(folder / _OUTPUT), done)
        errors += [_ended_line(batch_id, custom_id, ending) for custom_id in sorted(missing)]
        ids: dict[str, str] = {}
        stem = batch_id.removeprefix("batch_")
        if done:
            name = f"{batch_id}_output.jsonl"
            ids["output_file_id"] = self._files.keep(f"file-{stem}-output", folder / _OUTPUT, name, "batch_output").id
        if errors:
            write_new(folder / "errors.jsonl.new", write_lines(errors))
            rename(folder / "errors.jsonl.new", folder / "errors.jsonl")
            name = f"{batch_id}_errors.jsonl"
            ids["error_file_id"] = self._files.keep(
                f"file-{stem}-errors", folder / "errors.jsonl", name, "batch_output"
            ).id
        counts = {"completed": len(done), "failed": len(errors) - len(missing)}
        spent_tokens = {"input_tokens": spent["prompt_tokens"], "output_tokens": spent["completion_tokens"]}
        self._change(batch_id, ending, **ids, **counts, **spent_tokens)

    def _leave(self) -> None:
        for running in self._running.values():
            for handle in running.under_way:
                handle.cancel()
        until = time.monotonic() + _LEAVE_S
        while any(running.under_way for running in self._running.values()) and time.monotonic() < until:
            with suppress(Empty):
                self._inbox.get(timeout=_TICK_S)()
        for running in self._running.values():
            running.output.abandon("the server was stopped")


_USAGE = ("prompt_tokens", "completion_tokens")
_LEAVE_S = 10.0
"""Longest wait for the pass that is under way: what is in the journal by then is kept."""


def _too_long(service: Service, work: Work) -> str:
    try:
        check_room(service, len(work.prompt), work.sampling)
    except ApiError as error:
        return error.message
    raise AssertionError("it has room")


def _error_lines(path: Path, done: set[str]) -> list[str]:
    """Lines of refusals and failures, one for a custom id, and none for one that has an answer."""
    found: dict[str, str] = {}
    for text in _lines_of(path):
        found.setdefault(json.loads(text)["custom_id"], text)
    return [text for custom_id, text in found.items() if custom_id not in done]


def _lines_of(path: Path) -> Iterator[str]:
    """Lines of a file, which need not be there."""
    with suppress(FileNotFoundError), path.open(encoding="utf-8") as file:
        yield from (line.rstrip("\n") for line in file)


def _ended_line(batch_id: str, custom_id: str, ending: str) -> str:
    error = {"code": f"batch_{ending}", "message": _WORDS[ending]}
    line = {"id": f"batch_req_{batch_id[-12:]}", "custom_id": custom_id, "response": None, "error": error}
    return json.dumps(line, ensure_ascii=False)
