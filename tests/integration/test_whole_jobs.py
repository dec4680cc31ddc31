"""Jobs from requests to results in this process, through the stream engine on the CPU."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import read_jsonl, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from zeroinf.distributed.world import World
from zeroinf.errors import UsageError
from zeroinf.generation.row import Sampling
from zeroinf.generation.scheduler import Counts, Group
from zeroinf.jobs.options import RunOptions
from zeroinf.jobs.runner import run_job

CPU = torch.device("cpu")


class Deaf:
    """An observer that hears nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *heard: None


def run(model: Path, requests: Path, output: Path | None, **options: Any) -> Any:
    asked = {"sampling": Sampling(max_new_tokens=4), "offload": "cpu", "dtype": "float32", **options}
    asked |= {"model": str(model), "input_file": str(requests), "output_file": output}
    outcome = run_job(RunOptions(**asked), World(), CPU, sys.stdout, Deaf())
    assert outcome is not None and outcome.report is not None
    return outcome.report


@pytest.fixture(scope="module")
def model(small_checkpoint: Callable[[str], Path]) -> Path:
    return small_checkpoint("llama")


def test_random_lengths_fill_the_pool_as_long_as_rows_wait_and_never_more(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, count = random.Random(3), 160
    entries = [
        {"prompt": "word " * draw.randint(1, 12), "max_new_tokens": draw.randint(1, 90), "ignore_eos": True}
        for _ in range(count)
    ]
    used, begun = list[int](), [set[int]()]
    add = Counts.add

    def noted(self: Counts, groups: Sequence[Group], pages: int) -> None:
        add(self, groups, pages)
        used.append(pages)
        begun.append(begun[-1] | {seat.row.index for group in groups for seat in group.seats})

    monkeypatch.setattr(Counts, "add", noted)
    report = run(model, write_jsonl(tmp_path / "in.jsonl", entries), tmp_path / "out.jsonl", batch_size=16)
    pool = report.ranks[0].pool_pages
    steady = [pages for pages, seen in zip(used, begun, strict=False) if len(seen) < count][1:]
    found = read_jsonl(tmp_path / "out.jsonl")
    assert [line["completion_tokens"] for line in found] == [entry["max_new_tokens"] for entry in entries]
    assert max(used) <= pool
    assert len(steady) > 100
    assert sum(steady) / len(steady) >= 0.9 * pool


def test_logprobs_are_in_every_format_and_survive_the_journal(model: Path, tmp_path: Path) -> None:
    from pyarrow import parquet

    entries = [{"prompt": "one", "logprobs": 2}, {"prompt": "two words"}, {"prompt": "x", "logprobs": True}]
    requests = write_jsonl(tmp_path / "in.jsonl", entries)
    run(model, requests, tmp_path / "out.jsonl")
    first, second, third = read_jsonl(tmp_path / "out.jsonl")
    assert "logprobs" not in second
    assert [one["top_logprobs"] for one in third["logprobs"]] == [[]] * third["completion_tokens"]
    tokenizer, plain = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    ids = [*tokenizer("one")["input_ids"], *(one["id"] for one in first["logprobs"])]
    logs = plain(torch.tensor([ids])).logits[0].log_softmax(-1)[-5:-1]
    for one, wanted in zip(first["logprobs"], logs, strict=True):
        assert (one["token"], one["logprob"]) == (
            tokenizer.decode([one["id"]]),
            pytest.approx(wanted.max().item(), abs=1e-4),
        )
        assert [top["id"] for top in one["top_logprobs"]] == wanted.topk(2).indices.tolist()
        assert one["top_logprobs"][0] == {name: one[name] for name in ("token", "id", "logprob")}
    run(model, requests, tmp_path / "out.parquet")
    told = [row["logprobs"] for row in parquet.read_table(tmp_path / "out.parquet").to_pylist()]
    assert [each and json.loads(each) for each in told] == [first["logprobs"], None, third["logprobs"]]


def test_logprobs_are_refused_where_results_have_no_place_for_them(model: Path, tmp_path: Path) -> None:
    requests = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "one", "logprobs": 2}])
    with pytest.raises(UsageError, match="logprobs without --output-file"):
        run(model, requests, None)
