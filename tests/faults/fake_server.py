"""A server's files and batches without torch and HTTP: state folder, journals and threads are real, tokens made up."""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fake_job import decode, hurry

from zeroinf.generation.row import Sampling
from zeroinf.jobs.files import make_folder
from zeroinf.jobs.journal import read_records
from zeroinf.jobs.output import Job
from zeroinf.jobs.output_files import journal_path
from zeroinf.jobs.readers import read_requests
from zeroinf.jobs.work_list import WorkList
from zeroinf.serve import batches as batches_module
from zeroinf.serve.batches import Batches
from zeroinf.serve.errors import ApiError
from zeroinf.serve.files import FileStore
from zeroinf.serve.gateway import Gateway
from zeroinf.serve.settings import Settings
from zeroinf.service.core import Asked
from zeroinf.service.handles import Handle, TokenEvent
from zeroinf.service.requests import Work

MODEL, PATH = "fake", "/v1/completions"
DEFAULTS = Sampling(max_new_tokens=4)
_WAIT_S = 60.0

Told = Callable[[str, str], None]
"""Of a client: what it was told, and of which id."""


def content(requests: int) -> bytes:
    """A batch's input; one of its lines is refused."""
    bodies: list[dict[str, Any]] = [{"prompt": f"Grüße {i}", "max_tokens": 1 + i % 4} for i in range(requests)]
    bodies.append({"prompt": "x", "tools": [{}]})
    lines = [
        {"custom_id": str(i), "method": "POST", "url": PATH, "body": {**body, "model": MODEL}}
        for i, body in enumerate(bodies)
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def read_job(input_file: Path, output_file: Path, model: str) -> Job:
    """The job of a batch, with bytes for tokens."""
    with input_file.open("rb") as source:
        requests, refusals = read_requests((), source, DEFAULTS, input_format="jsonl", name="in.jsonl")
    work = tuple(
        Work(
            index=r.index,
            line=r.line,
            id=r.id,
            text=r.prompt,
            prompt=tuple((r.prompt or "").encode()),
            sampling=r.sampling,
        )
        for r in requests
    )
    extras = {r.index: r.extra for r in requests if r.extra is not None}
    marks = {"model": model, "prompts": str(len(requests))}
    return Job(
        work=WorkList.of(work, extras), refusals=tuple(refusals), fingerprint=marks, output_format="openai",
        model=model, began=1_000_000.0,
    )  # fmt: skip


class InstantService:
    """Completes each request at once, by its prompt alone."""

    has_failed = False

    def __init__(self) -> None:
        anatomy = SimpleNamespace(context_limit=None)
        sizes = {"batch_size": 2, "streams": 1, "prompt_tokens": 99, "new_tokens": 9, "prefix_pages": 0}
        plan = SimpleNamespace(**sizes, static_batches=False, anatomy=anatomy)
        control = SimpleNamespace(world=SimpleNamespace(size=1))
        self.model = SimpleNamespace(plan=plan, control=control, codec=None)
        self._count = 0

    def submit_all(self, asked: Sequence[Asked], *, priority: str) -> list[Handle]:
        return [self._answer(one.prompt, one.sampling) for one in asked]

    def _answer(self, prompt: Sequence[int], sampling: Sampling) -> Handle:
        self._count += 1
        handle = Handle(self._count, len(prompt), lambda number: None)
        tokens = list(prompt[-sampling.max_new_tokens :])
        handle.heard(TokenEvent(text=decode(tokens), tokens=tokens, finish_reason="length"))
        return handle


def run_server(state: Path, known: dict[str, str], requests: int, told: Told) -> int:
    """A server on `state` and a client that goes on behind what is `known`: it uploads, begins a batch, and waits.

    `told` hears of each answer, and of what is gone that had been told. Returns 2 where the server fails or refuses.
    For a child.
    """
    hurry()
    batches_module._TICK_S = 0.005
    gateway, service = Gateway(Settings(model_name=MODEL), DEFAULTS), InstantService()
    try:
        make_folder(state, 0o700)
        files = FileStore(state / "files", 1 << 30)
        batches = Batches(state / "batches", files, gateway)
    except OSError:
        return 2
    gateway.open(service)  # type: ignore[arg-type]
    _look(known, files, batches, content(requests), told)
    batches.start(service, read_job)  # type: ignore[arg-type]
    try:
        if "file" not in known:
            known["file"] = files.add(io.BytesIO(content(requests)), "in.jsonl", "batch").id
            told("file", known["file"])
        if "batch" not in known:
            asked = {"input_file_id": known["file"], "endpoint": PATH, "completion_window": "24h"}
            known["batch"] = batches.create(asked).id
            told("batch", known["batch"])
    except ApiError:
        return 2
    until = time.monotonic() + _WAIT_S
    while not (batch := batches.get(known["batch"])).is_over:
        if gateway.state == "failed":
            return 2
        if time.monotonic() > until:
            return 3
        time.sleep(0.002)
    told(batch.status, batch.output_file_id or "")
    batches.stop()
    return 0


def _look(known: dict[str, str], files: FileStore, batches: Batches, sent: bytes, told: Told) -> None:
    """Whether all that a client was told is there still."""
    try:
        if "file" in known and files.content(known["file"]).read_bytes() != sent:
            told("lost", known["file"])
        if "batch" in known:
            batch = batches.get(known["batch"])
            if "completed" in known and (batch.status, batch.output_file_id) != ("completed", known["completed"]):
                told("lost", batch.id)
            if "completed" in known:
                files.content(known["completed"]).read_bytes()
    except (ApiError, OSError) as error:
        told("lost", str(error))


def outcome(state: Path, batch_id: str) -> tuple[dict[str, Any], Sequence[Any], Sequence[Any]]:
    """What a batch came to: counts, and lines of its output and of its errors, without what differs by time."""
    batch = json.loads((state / "batches" / batch_id / "batch.json").read_text())
    counts = {name: batch[name] for name in ("status", "total", "completed", "failed", "input_tokens", "output_tokens")}

    def lines(file_id: str) -> list[Any]:
        found = [json.loads(line) for line in (state / "files" / file_id / "content").read_bytes().splitlines()]
        bodies = [line["response"]["body"] for line in found]
        return [(one["custom_id"], body.get("choices", body)) for one, body in zip(found, bodies, strict=True)]

    return counts, lines(batch["output_file_id"]), lines(batch["error_file_id"])


def journalled(state: Path, batch_id: str) -> Counter[int]:
    """How often each request is in the journal of a batch."""
    journal = journal_path(state / "batches" / batch_id / "output.jsonl")
    return Counter(record["result"]["index"] for _, record, _ in read_records(journal) if record and "result" in record)
