"""Other programs' clients against `zeroinf serve`: curl, LangChain, LiteLLM and lm-evaluation-harness."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_serving import MODEL, server
from serving import NEW_TOKENS, PROMPT_TOKENS

from zeroinf.serve.gateway import Gateway

PROMPT = "in the beginning"
LENGTH = PROMPT_TOKENS + NEW_TOKENS


@pytest.fixture(scope="module")
def folder(small_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a chat template."""
    own = tmp_path_factory.mktemp("chatty") / "model"
    shutil.copytree(small_checkpoint("llama"), own)
    (own / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    return own


@pytest.fixture(scope="module")
def served(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Gateway]]:
    with server(folder, state=tmp_path_factory.mktemp("state")) as found:
        yield found


@pytest.fixture
def client(served: tuple[httpx.Client, Gateway]) -> httpx.Client:
    return served[0]


def text_of(client: httpx.Client, prompt: str, tokens: int) -> str:
    """The greedy completion of `prompt`."""
    body = client.post("/v1/completions", json={"prompt": prompt, "max_tokens": tokens}).json()
    return str(body["choices"][0]["text"])


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(client: httpx.Client, tmp_path: Path) -> None:
    """Completions whole and streamed, and a batch from upload to output."""

    def curl(path: str, *words: str) -> str:
        command = ["curl", "--silent", "--show-error", "--fail-with-body", "--noproxy", "*", *words]
        return subprocess.run([*command, f"{client.base_url}{path}"], capture_output=True, text=True, check=True).stdout

    typed = ("-H", "Content-Type: application/json", "-d")
    asked = {"prompt": PROMPT, "max_tokens": 6}
    text = text_of(client, PROMPT, 6)
    assert json.loads(curl("/v1/completions", *typed, json.dumps(asked)))["choices"][0]["text"] == text
    lines = curl("/v1/completions", "--no-buffer", *typed, json.dumps({**asked, "stream": True})).splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert "".join(one["choices"][0]["text"] for one in events) == text
    line = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": asked}
    (tmp_path / "in.jsonl").write_text(json.dumps(line))
    file = json.loads(curl("/v1/files", "-F", "purpose=batch", "-F", f"file=@{tmp_path / 'in.jsonl'}"))
    begun = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = json.loads(curl("/v1/batches", *typed, json.dumps(begun)))
    until = time.monotonic() + 60
    while batch["status"] != "completed":
        assert time.monotonic() < until, batch
        batch = json.loads(curl(f"/v1/batches/{batch['id']}"))
    output = json.loads(curl(f"/v1/files/{batch['output_file_id']}/content"))
    assert output["response"]["body"]["choices"][0]["text"] == text


@pytest.mark.full
def test_langchain(client: httpx.Client) -> None:
    """ChatOpenAI, whole and streamed, with usage; several at once."""
    langchain = pytest.importorskip("langchain_openai")
    chat = langchain.ChatOpenAI(
        base_url=f"{client.base_url}/v1", api_key="any", model=MODEL, temperature=0, max_tokens=6, max_retries=0
    )
    text = text_of(client, PROMPT, 6)
    answer = chat.invoke(PROMPT)
    assert answer.content == text
    assert answer.usage_metadata["output_tokens"] == 6
    assert "".join(piece.content for piece in chat.stream(PROMPT)) == text
    assert [one.content for one in chat.batch([PROMPT, "other"])] == [text, text_of(client, "other", 6)]
    with pytest.raises(Exception, match="tools"):
        chat.bind_tools([{"name": "f", "description": "d", "parameters": {"type": "object"}}]).invoke(PROMPT)


@pytest.mark.full
def test_litellm(client: httpx.Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Completions as an OpenAI server and as hosted vLLM, and files and batches, which go through to the server."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")
    own: dict[str, Any] = {"api_base": f"{client.base_url}/v1", "api_key": "any"}
    text = text_of(client, PROMPT, 6)
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 6, **own}
    for provider in ("openai", "hosted_vllm"):
        answer = litellm.completion(model=f"{provider}/{MODEL}", **asked)
        assert answer.choices[0].message.content == text
        pieces = litellm.completion(model=f"{provider}/{MODEL}", stream=True, **asked)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 6}
        lines = [
            {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body} for number in range(3)
        ]
        path = tmp_path / "in.jsonl"
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        with path.open("rb") as opened:
            file = litellm.create_file(file=opened, purpose="batch", custom_llm_provider=provider, **own)
        batch = litellm.create_batch(
            completion_window="24h",
            endpoint="/v1/completions",
            input_file_id=file.id,
            custom_llm_provider=provider,
            **own,
        )
        until = time.monotonic() + 60
        while batch.status != "completed":
            assert time.monotonic() < until, batch
            batch = litellm.retrieve_batch(batch_id=batch.id, custom_llm_provider=provider, **own)
        found = litellm.file_content(file_id=batch.output_file_id, custom_llm_provider=provider, **own)
        output = [json.loads(line) for line in found.text.splitlines()]
        assert [line["response"]["body"]["choices"][0]["text"] for line in output] == [text] * 3


@pytest.mark.full
def test_lm_eval_local_completions(folder: Path, client: httpx.Client) -> None:
    """The harness over HTTP, with the server's tokenizer, finds the log-likelihoods of its own `hf`."""
    pytest.importorskip("tenacity")
    models = pytest.importorskip("lm_eval.models.openai_completions")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    def requests(kind: Any, *asked: tuple[Any, ...]) -> list[Instance]:
        return [
            Instance(request_type=kind, doc={}, arguments=one, idx=0, metadata=("task", number, 1))
            for number, one in enumerate(asked)
        ]

    remote = models.LocalCompletionsAPI(
        base_url=f"{client.base_url}/v1/completions", model=MODEL, batch_size=3, max_length=LENGTH, max_retries=1
    )
    assert remote.tokenizer_backend == "remote"
    local = huggingface.HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    asked = [("a question? ", letter) for letter in "ABCD"] + [("longer ", "answers"), ("x", "y z")]
    found = remote.loglikelihood(requests("loglikelihood", *asked), disable_tqdm=True)
    wanted = local.loglikelihood(requests("loglikelihood", *asked), disable_tqdm=True)
    assert [log for log, _ in found] == pytest.approx([log for log, _ in wanted], abs=1e-3)
    assert [bool(greedy) for _, greedy in found] == [bool(greedy) for _, greedy in wanted]
    until = [(PROMPT, {"until": ["\n\n"], "max_gen_toks": NEW_TOKENS, "do_sample": False})]
    assert remote.generate_until(requests("generate_until", *until), disable_tqdm=True) == [
        text_of(client, PROMPT, NEW_TOKENS)
    ]
