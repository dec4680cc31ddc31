"""One server over several ranks, in every way that they can share the work, with the texts of plain transformers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from serving import plain

import zeroinf

CELLS: dict[str, dict[str, Any]] = {
    "two streams that share fetches": {"num_gpus": 2, "offload": "cpu", "fetch": "partitioned"},
    "two streams, each with its own copy": {"num_gpus": 2, "offload": "cpu", "fetch": "replicated"},
    "two whole models": {"num_gpus": 2, "engine": "resident"},
    "tensor-parallel": {"num_gpus": 2, "engine": "tensor-parallel"},
    "DeepSpeed ZeRO-3": {"num_gpus": 2, "engine": "zero", "offload": "cpu"},
    "one whole model": {"engine": "resident"},
}
PROMPTS = ["in the beginning", "b", "and so on", "the end", "once more", "x y z"]
NEW = 6


def expected(folder: Path) -> list[str]:
    import torch
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), plain(folder, "llama")
    texts = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :]
        texts.append(str(tokenizer.decode(out, skip_special_tokens=True)))
    return texts


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize("cell", CELLS)
def test_a_server_on_several_ranks(small_checkpoint: Callable[[str], Path], tmp_path: Path, cell: str) -> None:
    folder = small_checkpoint("llama")
    texts = expected(folder)
    lengths = {"max_prompt_tokens": 24, "max_new_tokens": 12, "batch_size": 2, "dtype": "float32"}
    deployed = zeroinf.deploy(str(folder), name="ranks", state=tmp_path / "state", **lengths, **CELLS[cell])
    address, server = deployed.server.address, psutil.Process(deployed.server.pid)
    try:
        ranks = server.children()
        assert len(ranks) >= CELLS[cell].get("num_gpus", 1) - 1
        assert [one.generated_text for one in deployed.generate(PROMPTS, max_new_tokens=NEW)] == texts
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)

        def streamed(prompt: str) -> str:
            pieces = client.completions.create(model=str(folder), prompt=prompt, max_tokens=NEW, stream=True)
            return "".join(piece.choices[0].text for piece in pieces)

        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            assert list(pool.map(streamed, PROMPTS)) == texts
        with httpx.stream(
            "POST",
            f"{address}/v1/completions",
            json={"prompt": "a", "max_tokens": 12, "ignore_eos": True, "stream": True},
        ) as left:
            next(left.iter_lines())
        bodies = [{"prompt": prompt, "max_tokens": NEW} for prompt in PROMPTS]
        lines = [
            {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}
            for number, body in enumerate(bodies)
        ]
        content = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
        file = client.files.create(file=("in.jsonl", content), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        until = time.monotonic() + 120
        while batch.status != "completed":
            assert time.monotonic() < until and batch.status in ("validating", "in_progress", "finalizing"), batch
            time.sleep(0.05)
            batch = client.batches.retrieve(batch.id)
        assert batch.output_file_id is not None
        output = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
        assert [line["response"]["body"]["choices"][0]["text"] for line in output] == texts
        assert httpx.get(f"{address}/metrics").text.count("zeroinf_num_requests_running 0.0") == 1
    finally:
        zeroinf.terminate("ranks")
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)


@pytest.mark.full
@pytest.mark.timeout(300)
def test_a_server_that_loses_a_rank_says_so_and_ends(small_checkpoint: Callable[[str], Path]) -> None:
    folder = small_checkpoint("llama")
    deployed = zeroinf.deploy(
        str(folder), name="lost", num_gpus=2, offload="cpu", max_prompt_tokens=24, max_new_tokens=12
    )
    server = psutil.Process(deployed.server.pid)
    for rank in server.children():
        rank.kill()
    assert psutil.wait_procs([server], timeout=60)[1] == []
    with pytest.raises(zeroinf.errors.ZeroinfError, match="does not answer"):
        deployed.generate("x")
