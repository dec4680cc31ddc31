"""Files and batches of `zeroinf serve`: what OpenAI's client sees, and what a killed server goes on with."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from forked import CHANGES, Forked
from http_serving import MODEL, server
from launching import journalled, run_zeroinf
from serving import NEW_TOKENS

from zeroinf.distributed.ports import free_port
from zeroinf.jobs.output_files import journal_path
from zeroinf.serve.batch_records import Batch
from zeroinf.serve.gateway import Gateway

PATH = "/v1/completions"


@pytest.fixture(scope="module")
def folder(small_checkpoint: Callable[[str], Path]) -> Path:
    return small_checkpoint("llama")


@pytest.fixture(scope="module")
def served(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Gateway]]:
    with server(folder, state=tmp_path_factory.mktemp("state")) as found:
        yield found


@pytest.fixture
def client(served: tuple[httpx.Client, Gateway]) -> openai.OpenAI:
    return official(served[0])


def official(client: httpx.Client) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="any", max_retries=0)


def line_of(custom_id: str, **body: Any) -> dict[str, Any]:
    body = {"model": MODEL, "prompt": f"say {custom_id}", "max_tokens": 6, **body}
    return {"custom_id": custom_id, "method": "POST", "url": PATH, "body": body}


def jsonl(lines: Sequence[Any]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def begin(client: openai.OpenAI, content: bytes, window: Any = "24h") -> Any:
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=PATH, completion_window=window)


def ended(client: openai.OpenAI, batch: Any) -> Any:
    until = time.monotonic() + 120
    while batch.status not in ("completed", "failed", "cancelled", "expired"):
        assert time.monotonic() < until, batch
        time.sleep(0.02)
        batch = client.batches.retrieve(batch.id)
    return batch


def lines_in(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    """Lines of a file by custom_id, each of which is there once."""
    assert file_id is not None
    lines = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


def texts(lines: dict[str, Any]) -> dict[str, list[str]]:
    return {name: [one["text"] for one in line["response"]["body"]["choices"]] for name, line in lines.items()}


def test_a_batch_is_what_a_run_is(folder: Path, client: openai.OpenAI, tmp_path: Path) -> None:
    """Texts of greedy and sampled requests, refused settings in the error file, counts and usage."""
    good = [line_of(f"a{number}") for number in range(6)]
    good += [line_of(f"s{number}", temperature=0.9, seed=number) for number in range(6)]
    good += [line_of("twice", temperature=0.9, n=2)]
    good += [line_of("shaped", response_format={"type": "regex", "regex": "[a-f]{5}"})]
    bad = [line_of("tools", tools=[{}]), line_of("long", max_tokens=NEW_TOKENS + 1), line_of("other", model="b")]
    batch = begin(client, jsonl([*good, *bad]))
    assert batch.status == "validating"
    batch = ended(client, batch)
    assert batch.status == "completed"
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (17, 14, 3)
    output, errors = lines_in(client, batch.output_file_id), lines_in(client, batch.error_file_id)
    (tmp_path / "in.jsonl").write_bytes(jsonl(good))
    done = run_zeroinf(["-m", str(folder), "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "-q"])
    assert done.code == 0, done.err
    run = {line["custom_id"]: line for line in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    assert texts(output) == texts(run)
    assert list(output) == list(run), "in the order of the input"
    assert re.fullmatch("[a-f]{5}", texts(output)["shaped"][0])
    said = {name: (line["response"]["status_code"], line["response"]["body"]["error"]) for name, line in errors.items()}
    assert {status for status, _ in said.values()} == {400}
    assert "tools" in said["tools"][1]["message"]
    assert "--max-new-tokens" in said["long"][1]["message"]
    assert "no model 'b'" in said["other"][1]["message"]
    spent = sum(line["response"]["body"]["usage"]["completion_tokens"] for line in output.values())
    assert batch.usage is not None and batch.usage.output_tokens == spent
    assert batch.id in [one.id for one in client.batches.list(limit=1).data]


def test_files_come_and_go(client: openai.OpenAI) -> None:
    content = jsonl([line_of("x")])
    file = client.files.create(file=("../../etc/passwd", content), purpose="batch")
    assert (file.bytes, file.purpose, file.status) == (len(content), "batch", "processed")
    assert client.files.content(file.id).content == content
    listed = [one.id for one in client.files.list(purpose="batch", order="desc")]
    assert file.id in listed
    client.files.create(file=("more", content), purpose="batch")
    paged = [one.id for one in client.files.list(purpose="batch", limit=1, order="asc")]
    assert len(paged) == len(set(paged)) == len(listed) + 1
    assert client.files.delete(file.id).deleted
    for gone in (file.id, "..%2f..%2fbatches", "%2e%2e", "x" * 300, "%00"):
        assert httpx.get(f"{client.base_url}files/{gone}").status_code == 404
    with pytest.raises(openai.BadRequestError, match="purpose"):
        client.files.create(file=("x", b"x"), purpose="fine-tune")
    with pytest.raises(openai.NotFoundError, match="no file"):
        client.batches.create(input_file_id=file.id, endpoint=PATH, completion_window="24h")


@pytest.mark.parametrize(
    ("lines", "code", "number"),
    [
        ([line_of("a"), line_of("a")], "duplicate_custom_id", 2),
        ([{**line_of("a"), "url": "/v1/chat/completions"}], "mismatched_endpoint", 1),
        ([{**line_of("a"), "custom_id": None}], "missing_required_parameter", 1),
        ([line_of("a"), [1]], "invalid_json_line", 2),
        ([{**line_of("a"), "extra": 1}], "unknown_key", 1),
        ([], "empty_file", None),
    ],
)
def test_a_malformed_file_fails_the_batch(client: openai.OpenAI, lines: list[Any], code: str, number: int) -> None:
    batch = ended(client, begin(client, jsonl(lines)))
    assert batch.status == "failed"
    assert [(error.code, error.line) for error in batch.errors.data] == [(code, number)]


def test_a_file_that_a_run_reads_is_read_here_too(client: openai.OpenAI) -> None:
    """Whatever program wrote its URLs, its methods, its ids and its line ends."""
    urls = ("completions", "https://api.openai.com/v1/completions", "/v1/completions/")
    lines = [{**line_of(str(number)), "url": url, "method": "post"} for number, url in enumerate(urls)]
    lines[0]["custom_id"] = 0
    content = "\r\n".join(map(json.dumps, lines)).encode("utf-16")
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    batch: Any = client.batches.create(input_file_id=file.id, endpoint="/completions", completion_window="24h")  # type: ignore[arg-type]
    assert batch.endpoint == PATH
    batch = ended(client, batch)
    assert sorted(lines_in(client, batch.output_file_id)) == ["0", "1", "2"], batch
    for wrong, why in ((gzip.compress(content), "compressed by gzip"), (bytes(range(256)), "no text")):
        batch = ended(client, begin(client, wrong))
        assert batch.status == "failed"
        assert why in batch.errors.data[0].message


def test_the_last_completions_of_a_batch_are_its_shortest(folder: Path, tmp_path: Path) -> None:
    """As in a run, so that none of them runs on alone in the end."""
    lengths = {"one": NEW_TOKENS, "two": 2, "three": 5}
    with server(folder, state=tmp_path, plan={"rows": 1}) as (http, _):
        client = official(http)
        lines = [line_of(name, max_tokens=length, ignore_eos=True) for name, length in lengths.items()]
        batch = ended(client, begin(client, jsonl(lines)))
    journal = (tmp_path / "batches" / batch.id / "output.jsonl.journal").read_text()
    assert re.findall(r'"id": ?"(one|two|three)"', journal) == ["one", "three", "two"]


def test_a_server_without_a_state_says_so(folder: Path) -> None:
    with server(folder) as (client, _), pytest.raises(openai.BadRequestError, match="--state"):
        official(client).batches.list()


def test_batches_end_early_and_interactive_requests_go_first(folder: Path, tmp_path: Path) -> None:
    with server(folder, slow_s=0.05, state=tmp_path / "state") as (http, _):
        client = official(http)
        many = jsonl([line_of(str(number), max_tokens=NEW_TOKENS, ignore_eos=True) for number in range(200)])
        cancelled, expired = begin(client, many), begin(client, many, "1h")
        until = time.monotonic() + 120
        while not client.batches.retrieve(cancelled.id).request_counts.completed:
            assert time.monotonic() < until
            time.sleep(0.02)
        client.completions.create(model=MODEL, prompt="quick", max_tokens=2)
        assert client.batches.retrieve(cancelled.id).request_counts.completed < 200, "it did not wait for the batch"
        assert client.batches.cancel(cancelled.id).status in ("cancelling", "cancelled")
        batch = ended(client, cancelled)
        assert batch.status == "cancelled"
        output, errors = lines_in(client, batch.output_file_id), lines_in(client, batch.error_file_id)
        assert output.keys() | errors.keys() == {str(number) for number in range(200)}
        assert not output.keys() & errors.keys()
        assert {line["error"]["code"] for line in errors.values()} == {"batch_cancelled"}
        assert client.batches.retrieve(expired.id).status == "in_progress"
        with pytest.raises(openai.BadRequestError, match="cannot be cancelled"):
            client.batches.cancel(cancelled.id)
        clock = time.time
        try:
            time.time = lambda: clock() + 3601
            batch = ended(client, expired)
        finally:
            time.time = clock
        assert batch.status == "expired"
        assert {line["error"]["code"] for line in lines_in(client, batch.error_file_id).values()} == {"batch_expired"}


SLOW = {
    "zeroinf.service.loaded": "import time\nmake = own.LoadedModel.run\n"
    "def run(self, feed):\n"
    "    forward = self.engine.forward\n"
    "    def slower(*given, **named):\n        time.sleep(0.02)\n        return forward(*given, **named)\n"
    "    self.engine.forward = slower\n"
    "    return make(self, feed)\n"
    "own.LoadedModel.run = run\n"
}


@contextmanager
def process(folder: Path, state: Path) -> Iterator[tuple[Forked, openai.OpenAI]]:
    """`zeroinf serve` in a process of its own, once it is ready; killed at the end of the block, whatever it does."""
    port = str(free_port())
    lengths = ["--max-prompt-tokens", "24", "--max-new-tokens", str(NEW_TOKENS), "--batch-size", "4"]
    command = ["zeroinf", "serve", "-m", str(folder), "--served-model-name", MODEL, "--port", port, *lengths]
    env = {**os.environ, CHANGES: json.dumps(SLOW)}
    running = Forked([*command, "--state", str(state), "-q"], env, stdin=False, own_group=False)
    try:
        address, until = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while True:
            try:
                if httpx.get(f"{address}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert running.poll() is None, running.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.02)
        yield running, openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
    finally:
        running.kill()
        running.wait()


@pytest.mark.parametrize("kills", [1, pytest.param(15, marks=[pytest.mark.full, pytest.mark.timeout(900)])])
def test_a_server_that_is_killed_loses_nothing_and_doubles_nothing(folder: Path, tmp_path: Path, kills: int) -> None:
    draw, names = random.Random(kills), [str(number) for number in range(20 + 20 * kills)]
    lines = [line_of(name, max_tokens=NEW_TOKENS, ignore_eos=True, temperature=0.7) for name in names]
    state, batch = tmp_path / "state", None
    done = list[int]()
    for kill in range(kills):
        with process(folder, state) as (_, client):
            batch = batch or begin(client, jsonl(lines))
            time.sleep(draw.uniform(0.0, 0.6))
            shown = client.batches.retrieve(batch.id).request_counts.completed
            while kill == kills - 1 and not shown:  # the last one has something to lose
                time.sleep(0.01)
                shown = client.batches.retrieve(batch.id).request_counts.completed
        own = state / "batches" / batch.id
        done.append(len(journalled(journal_path(own / "output.jsonl"))))
        assert shown <= Batch.load(own).completed <= done[-1], "the next server shows no fewer"
    with process(folder, state) as (running, client):
        batch = ended(client, client.batches.retrieve(batch.id))
        assert batch.status == "completed"
        assert batch.request_counts.completed == len(names)
        output = lines_in(client, batch.output_file_id)
        running.send_signal(15)
        assert running.wait(60) == 0
    assert list(output) == names
    assert done == sorted(done), "what was done stays done"
    assert done[-1] > 0
    with server(folder, state=tmp_path / "other") as (http, _):
        client = official(http)
        again = lines_in(client, ended(client, begin(client, jsonl(lines))).output_file_id)
    assert texts(output) == texts(again)
