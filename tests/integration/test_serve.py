"""`zeroinf serve` over HTTP: what OpenAI's own client sees, errors, limits, and clients that leave."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from http_serving import MODEL, server
from serving import NEW_TOKENS, PROMPT_TOKENS, plain

from zeroinf.serve.gateway import Gateway

PROMPT = "in the beginning"


@pytest.fixture(scope="module")
def folder(small_checkpoint: Callable[[str], Path]) -> Path:
    return small_checkpoint("llama")


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[tuple[httpx.Client, Gateway]]:
    with server(folder) as found:
        yield found


@pytest.fixture
def client(served: tuple[httpx.Client, Gateway]) -> httpx.Client:
    return served[0]


@pytest.fixture
def official(client: httpx.Client) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="any", max_retries=0)


def expected(folder: Path, prompt: str, new: int) -> str:
    """The greedy text of plain transformers."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = plain(folder, "llama").generate(ids, max_new_tokens=new, do_sample=False)[0, ids.shape[1] :]
    return str(tokenizer.decode(out, skip_special_tokens=True))


def test_completions_are_those_of_transformers_whole_and_streamed(folder: Path, official: openai.OpenAI) -> None:
    text = expected(folder, PROMPT, 8)
    whole = official.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8)
    assert whole.choices[0].text == text
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None and whole.usage.completion_tokens == 8
    assert whole.usage.prompt_tokens == len(PROMPT)
    stream = official.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=8, stream=True, stream_options={"include_usage": True}
    )
    pieces = list(stream)
    assert "".join(choice.text for piece in pieces for choice in piece.choices) == text
    assert pieces[-1].usage == whole.usage
    assert len(pieces) > 3


def test_echo_several_prompts_and_token_ids(folder: Path, official: openai.OpenAI) -> None:
    first, second = (expected(folder, prompt, 4) for prompt in (PROMPT, "other"))
    found = official.completions.create(model=MODEL, prompt=[PROMPT, "other"], max_tokens=4, echo=True)
    assert [one.text for one in found.choices] == [PROMPT + first, f"other{second}"]
    assert [one.index for one in found.choices] == [0, 1]
    ids = official.post("../tokenize", body={"prompt": PROMPT}, cast_to=httpx.Response).json()
    assert (ids["count"], ids["max_model_len"]) == (len(PROMPT), PROMPT_TOKENS + NEW_TOKENS)
    again = official.completions.create(model=MODEL, prompt=ids["tokens"], max_tokens=4)
    assert again.choices[0].text == first
    text = official.post("../detokenize", body={"tokens": ids["tokens"]}, cast_to=httpx.Response).json()
    assert text == {"prompt": PROMPT}


def test_chats_stream_with_logprobs_and_choices(official: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "prompt": PROMPT,
        "max_tokens": 5,
        "temperature": 0.8,
        "n": 2,
        "seed": 7,
        "logprobs": 2,
    }
    whole = official.completions.create(**asked)
    texts = ["", ""]
    logprobs: list[list[float]] = [[], []]
    for piece in official.completions.create(**asked, stream=True):
        for choice in piece.choices:
            texts[choice.index] += choice.text
            if choice.logprobs is not None:
                logprobs[choice.index] += choice.logprobs.token_logprobs or []
    assert texts == [one.text for one in whole.choices]
    assert texts[0] != texts[1]
    assert logprobs == [one.logprobs.token_logprobs for one in whole.choices if one.logprobs is not None]
    without_seed = [official.completions.create(**{**asked, "seed": None, "n": 1}).choices[0].text for _ in range(4)]
    assert len(set(without_seed)) > 1


def test_an_echo_has_the_log_probabilities_of_the_prompt(folder: Path, client: httpx.Client) -> None:
    """As lm-eval reads them: of each token but the first, and of the likeliest in its place."""
    import torch

    prompts = [[5, 9, 7, 30, 2, 8], [11, 12, 13], [40]]
    asked = {"prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1234}
    body = client.post("/v1/completions", json=asked).json()
    model = plain(folder, "llama")
    for prompt, choice in zip(prompts, body["choices"], strict=True):
        told = choice["logprobs"]
        assert len(told["tokens"]) == len(prompt) + 1
        assert (told["token_logprobs"][0], told["top_logprobs"][0], told["text_offset"][0]) == (None, None, 0)
        with torch.no_grad():
            logs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        expected = [logs[at, token].item() for at, token in enumerate(prompt[1:])]
        assert told["token_logprobs"][1:-1] == pytest.approx(expected, abs=1e-4)
        best = [max(top.values()) for top in told["top_logprobs"][1:]]
        assert best == pytest.approx(logs.max(-1).values.tolist(), abs=1e-4)
        assert told["token_logprobs"][-1] == best[-1], "the new one is greedy"
    with client.stream("POST", "/v1/completions", json={**asked, "stream": True}) as streamed:
        lines = [line.removeprefix("data: ") for line in streamed.iter_lines() if line.startswith("data: {")]
    pieces = {choice["index"]: choice for line in lines for choice in json.loads(line)["choices"]}
    assert [pieces[number]["logprobs"] for number in range(3)] == [one["logprobs"] for one in body["choices"]]
    assert [pieces[number]["text"] for number in range(3)] == [one["text"] for one in body["choices"]]


def test_scores_of_prompts_are_dropped_with_their_client_and_need_a_plan(folder: Path) -> None:
    asked: dict[str, Any] = {"echo": True, "logprobs": 1, "max_tokens": 1}
    with server(folder, slow_s=0.1, heartbeat_s=0.02) as (client, gateway):
        many = {**asked, "prompt": [[number] * 20 for number in range(3, 103)]}
        with client.stream("POST", "/v1/completions", json=many) as left:
            assert left.status_code == 200
        wait_until(lambda: not gateway.under_way)
        passes = gateway.service.model.engine.stats().passes
        assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
        gateway.service.drain()
        assert gateway.service.model.engine.stats().passes < passes + 10, "what nobody waits for does not run"
    with server(folder, plan={"scored_tokens": 0}) as (client, _):
        refused = client.post("/v1/completions", json={**asked, "prompt": "x"})
        assert "--prompt-logprobs" in refused.json()["error"]["message"]


def test_a_chat_is_answered(folder: Path, tmp_path: Path) -> None:
    import shutil

    own = tmp_path / "chatty"
    shutil.copytree(folder, own)
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (own / "chat_template.jinja").write_text(template)
    with server(own) as (client, _):
        official = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="any", max_retries=0)
        asked: Any = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 6}
        whole = official.chat.completions.create(**asked, logprobs=True)
        assert whole.choices[0].message.content == expected(folder, PROMPT, 6)
        assert whole.choices[0].logprobs is not None and len(whole.choices[0].logprobs.content or ()) == 6
        pieces = list(official.chat.completions.create(**asked, stream=True))
        assert pieces[0].choices[0].delta.role == "assistant"
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.choices[0].message.content
        assert pieces[-1].choices[0].finish_reason == "length"


def test_answers_have_the_format_that_was_asked_for(official: openai.OpenAI, client: httpx.Client) -> None:
    """A schema, streamed and with choices of its own; what cannot be carried out is refused by name."""
    pytest.importorskip("llguidance")
    place = {"type": "object", "properties": {"name": {"enum": ["Paris", "Rome"]}}, "required": ["name"]}
    schema = {"type": "json_schema", "json_schema": {"name": "place", "schema": place}}
    length = {"type": "regex", "regex": "[a-f]{3,5}x"}
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": NEW_TOKENS}
    texts = []
    for asked in ({}, {"temperature": 1.5, "seed": 3, "n": 3}, {"stream": True}):
        found = client.post("/v1/completions", json={**body, **asked, "response_format": length})
        if "stream" not in asked:
            texts += [choice["text"] for choice in found.json()["choices"]]
            continue
        events = [json.loads(line[6:]) for line in found.text.splitlines() if line.startswith("data: {")]
        texts.append("".join(event["choices"][0]["text"] for event in events))
    assert len(texts) == 5
    assert all(re.fullmatch("[a-f]{3,5}x", text) for text in texts), texts
    assert texts[0] == texts[-1]
    for wrong, said in (
        ({"type": "json"}, "must have a type"),
        ({"type": "json_schema", "json_schema": {"schema": {"typ": "string"}}}, "did you mean 'type'"),
        ({"type": "regex", "regex": "(?=a)"}, "the regex cannot be carried out"),
    ):
        refused = client.post("/v1/completions", json={**body, "response_format": wrong})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "response_format")
        assert said in refused.json()["error"]["message"]
    refused = client.post("/v1/completions", json={**body, "guided_json": {}})
    assert "response_format does it" in refused.json()["error"]["message"]
    start = official.completions.create(**body, extra_body={"response_format": schema}).choices[0].text
    assert re.fullmatch(r'\{\s*("n?a?m?e?"?.*)?', start, re.DOTALL), "as far as the tokens go"


def test_models_health_version_and_figures(client: httpx.Client, official: openai.OpenAI) -> None:
    assert [model.id for model in official.models.list()] == [MODEL]
    assert official.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        official.models.retrieve("other")
    assert client.get("/health").json() == {"status": "ready"}
    assert set(client.get("/version").json()) == {"version"}
    assert client.get("/tokenizer_info").json()["eos_token"] == "</s>"
    official.completions.create(model=MODEL, prompt=PROMPT, max_tokens=2)
    figures = client.get("/metrics").text
    for name in (
        "num_requests_running",
        "prefix_cache_hits_total",
        'columns_total{phase="prefill"}',
        'padding_columns_total{phase="decode"}',
        "passes_total",
        "streamed_bytes_total",
        "time_to_first_token_seconds_count",
    ):
        assert f"zeroinf_{name}" in figures
    assert 'zeroinf_request_success_total{finished_reason="length"}' in figures


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"prompt": ""}, 400, "must not be empty"),
        ({"prompt": "x", "temprature": 1}, 400, "did you mean 'temperature'"),
        ({"prompt": "x", "tools": [{"type": "function"}]}, 400, "not supported"),
        ({"prompt": "x", "max_tokens": NEW_TOKENS + 1}, 400, "--max-new-tokens"),
        ({"prompt": "x" * (PROMPT_TOKENS + 1)}, 400, "--max-prompt-tokens"),
        ({"prompt": [999]}, 400, "token 999"),
        ({"prompt": "x", "model": "other"}, 404, "no model 'other'"),
        ({"prompt": "x", "stream": "yes"}, 400, "stream must be true or false"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, 400, "needs stream=true"),
        ({"prompt": "x", "echo": True, "logprobs": 2}, 400, "the likeliest one is told"),
        ({"prompt": "x", "echo": "yes", "logprobs": 1}, 400, "echo must be true or false"),
    ],
)
def test_what_is_wrong_with_a_request_is_said(
    client: httpx.Client, body: dict[str, Any], status: int, said: str
) -> None:
    found = client.post("/v1/completions", json={"model": MODEL, **body})
    assert found.status_code == status
    assert said in found.json()["error"]["message"]
    assert set(found.json()["error"]) == {"message", "type", "param", "code"}


def test_what_is_no_request_is_refused(client: httpx.Client) -> None:
    typed = {"content-type": "application/json"}
    for content in (b"", b"[]", b"{", b'{"prompt": "a", "prompt": "b"}', b'{"prompt": NaN}', b"\xff", b"[" * 9999):
        found = client.post("/v1/completions", content=content, headers=typed)
        assert found.status_code == 400, content
    assert client.post("/v1/completions", content=b"{}").status_code == 415
    assert client.post("/v1/completions", content=b"x" * (5 << 20), headers=typed).status_code == 413
    assert client.get("/v1/nothing").json()["error"]["message"] == "there is nothing at /v1/nothing"
    assert client.get("/v1/completions").status_code == 405
    assert client.get("/health", headers={"host": "evil.example"}).status_code == 400
    assert client.get("/health", headers={"origin": "http://evil.example"}).status_code == 403


def test_a_key_is_asked_for(folder: Path) -> None:
    with server(folder, api_key="s3cret") as (client, _):
        assert client.get("/health").status_code == 200
        for given in ({}, {"authorization": "Bearer other"}, {"authorization": "s3cret"}):
            found = client.get("/v1/models", headers=given)
            assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key")
        official = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="s3cret")
        assert [model.id for model in official.models.list()] == [MODEL]


def test_the_page_loads_nothing_from_elsewhere(client: httpx.Client) -> None:
    page, script = client.get("/"), client.get("/page.js")
    assert page.status_code == script.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "//" not in page.text.partition("</style>")[2], "no address"
    status = client.get("/status").json()
    assert (status["model"], status["state"], status["keeps_batches"]) == (MODEL, "ready", False)
    assert {one["place"] for one in status["memory"]} == {"host"}
    assert status["max_new_tokens"] == NEW_TOKENS


def wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_slow_model_keeps_its_clients_and_lets_those_go_that_leave(folder: Path) -> None:
    """With a time-out far below an answer's time, OpenAI's client sends one request; one that leaves frees its row."""
    with server(folder, slow_s=0.3, heartbeat_s=0.05, max_queue=2) as (client, gateway):
        official = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="any", timeout=2)
        asked: Any = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "extra_body": {"ignore_eos": True}}
        seen = gateway.metrics
        began = seen.prompt_tokens._value.get()
        found = official.completions.create(**asked)
        assert found.usage is not None and found.usage.completion_tokens == 8
        assert len(list(official.completions.create(**asked, stream=True))) >= 2
        assert seen.prompt_tokens._value.get() - began == 2 * len(PROMPT), "asked twice, and once more by a retry"
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": NEW_TOKENS, "ignore_eos": True}
        scheduler = gateway.service.model.scheduler
        free = scheduler.free_rows
        for streamed in (False, True):
            with client.stream("POST", "/v1/completions", json={**body, "stream": streamed}) as left:
                assert left.status_code == 200
                wait_until(lambda: scheduler.free_rows < free)
            wait_until(lambda: not gateway.under_way and scheduler.free_rows == free)
        ended = gateway.metrics.text().decode()
        assert 'finished_reason="length"} 2.0' in ended, "those that left were not run to their end"


def test_a_slow_reader_holds_up_nobody(folder: Path) -> None:
    """It reads nothing of megabytes that are sent to it: others are answered, and its rows become free."""
    with server(folder, max_queue=256, plan={"rows": 8}) as (client, gateway):
        body = {"prompt": PROMPT, "max_tokens": NEW_TOKENS, "ignore_eos": True}
        large = json.dumps({**body, "n": 64, "temperature": 1, "logprobs": 20, "stream": True}).encode()
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            slow.connect(("127.0.0.1", client.base_url.port))
            slow.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(large), large)
            )
            wait_until(lambda: gateway.under_way > 0)
            assert client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == NEW_TOKENS
            wait_until(lambda: not gateway.under_way)
            scheduler = gateway.service.model.scheduler
            wait_until(lambda: scheduler.free_rows == gateway.service.model.plan.batch_size)
            assert client.post("/v1/completions", json=body).status_code == 200
            assert slow.recv(15) == b"HTTP/1.1 200 OK", "and what was sent to it is there still"


def test_a_full_queue_says_when_to_come_again(folder: Path) -> None:
    with server(folder, slow_s=0.1, heartbeat_s=0.02, max_queue=2) as (client, gateway):
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": NEW_TOKENS, "ignore_eos": True}
        two = {**body, "temperature": 1, "n": 2}
        with client.stream("POST", "/v1/completions", json=two) as first:
            assert first.status_code == 200
            refused = client.post("/v1/completions", json=body)
            assert refused.status_code == 429
            assert 1 <= int(refused.headers["retry-after"]) <= 120
        wait_until(lambda: not gateway.under_way)
        assert client.post("/v1/completions", json={**two, "n": 3}).status_code == 400


def test_a_server_that_stops_or_failed_says_so(folder: Path) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": NEW_TOKENS, "ignore_eos": True}
    with server(folder, slow_s=0.1, heartbeat_s=0.02) as (client, gateway):
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as under_way:
            lines = under_way.iter_lines()
            next(lines)
            gateway.drain()
            refused = client.post("/v1/completions", json=body)
            assert refused.status_code == 503 and refused.headers["retry-after"]
            assert client.get("/health").json() == {"status": "draining"}
            said = [line for line in lines if line.startswith("data")]
        assert said[-1] == "data: [DONE]", "what was under way came to its end"
    with server(folder, slow_s=0.1, heartbeat_s=0.02) as (client, gateway):
        for streamed in (True, False):
            with client.stream("POST", "/v1/completions", json={**body, "stream": streamed}) as failing:
                wait_until(lambda: gateway.under_way > 0)
                if not streamed:
                    gateway.service.fail(RuntimeError("the disk is gone"))
                    told = json.loads(failing.read())
                    assert told["error"]["type"] == "server_error"
        assert client.get("/health").json() == {"status": "failed"}


def test_the_dashboard_asks_for_figures_that_there_are(client: httpx.Client) -> None:
    dashboard = (Path(__file__).parents[2] / "configs" / "grafana" / "serve.json").read_text()
    asked = set(re.findall(r"zeroinf_\w+", dashboard.replace("label_values(", "")))
    figures = client.get("/metrics").text
    assert len(asked) > 10
    lacking = {name for name in asked if name not in figures}
    assert lacking == {"zeroinf_plan_tokens_per_second"}, "a plan that was made by hand has no rates"
