"""Runs as their plans say: where blocks rest when memory is short, and tokens that do not depend on it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from launching import read_jsonl, run_zeroinf, write_jsonl
from small_models import build_tokenizer, small_config
from transformers import AutoModelForCausalLM

from zeroinf.distributed.world import World
from zeroinf.generation.row import Sampling
from zeroinf.model.resolve import resolve_model
from zeroinf.options.options import RunOptions
from zeroinf.planner.memory import pieces, total
from zeroinf.planner.plan import Plan
from zeroinf.runs.prepare import prepare, read_job

BLOCKS = 24  # many more than a ring of read buffers and slots holds


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config, folder = small_config("llama"), tmp_path_factory.mktemp("deep") / "llama"
    config.num_hidden_layers = BLOCKS
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts and completions of many lengths."""
    entries = [{"prompt": "word " * (1 + i % 5), "max_new_tokens": 1 + 2 * i, "ignore_eos": True} for i in range(7)]
    return write_jsonl(tmp_path_factory.mktemp("requests") / "in.jsonl", entries)


def plan_of(options: RunOptions) -> Plan:
    source = resolve_model(options.model)
    reading = read_job(options, source, "cpu")
    return prepare(options, source, reading, reading.job.work, World(), "cpu").plan


def too_little_without_a_disk(model: Path, requests: Path, nvme: Path) -> int:
    """The first size of host memory, a block at a time, at which a run with a disk plans to use it."""
    options = RunOptions(
        model=str(model),
        sampling=Sampling(max_new_tokens=9),
        input_files=(str(requests),),
        batch_size=3,
        nvme_paths=(nvme,),
    )
    plan = plan_of(options)
    assert plan.offload == "none"
    size = total(plan.terms, "host")
    while plan.offload != "nvme":
        size -= max(pieces(plan.anatomy))
        plan = plan_of(replace(options, host_memory=size))
    return size


def test_where_the_host_is_too_small_blocks_rest_on_the_disk_and_tokens_are_the_same(
    model: Path, requests: Path, tmp_path: Path
) -> None:
    nvme, always = tmp_path / "nvme", ["-m", str(model), "-i", str(requests), "-b", "3"]
    nvme.mkdir()
    short = too_little_without_a_disk(model, requests, nvme)
    plenty = run_zeroinf([*always, "-o", str(tmp_path / "plenty.jsonl")])
    scarce = run_zeroinf(
        [
            *(*always, "-o", str(tmp_path / "scarce.jsonl"), "--report", str(tmp_path / "report.json")),
            *("--nvme-path", str(nvme), "--host-memory", f"{short}B"),
        ]
    )
    assert (plenty.code, scarce.code) == (0, 0), scarce.err
    assert f"offload none: {BLOCKS} layers in CPU memory" in plenty.err
    said = re.search(rf"offload nvme: (\d+) of {BLOCKS} layers in host memory, (\d+) on NVMe; batch", scarce.err)
    assert said, scarce.err
    assert f"output            {tmp_path / 'scarce.jsonl'}\n" in scarce.err, "nothing is cut off"
    assert int(said[1]) + int(said[2]) == BLOCKS
    assert read_jsonl(tmp_path / "scarce.jsonl") == read_jsonl(tmp_path / "plenty.jsonl")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["offload"], report["resident_blocks"]) == ("nvme", 0)
    assert report["ranks"][0]["stalls"].keys() == {"link_s", "disk_s", "compute_s", "host_s", "between_s"}
    assert {one["name"] for one in report["compared"]} == {"host memory in all", "load", "step", "speed"}


def test_the_plan_is_told_in_a_few_lines_and_stands_beside_what_was_measured(model: Path, requests: Path) -> None:
    done = run_zeroinf(["-m", str(model), "-i", str(requests)])
    assert done.code == 0, done.err
    lines = done.err.splitlines()
    assert re.match(r"plan: stream engine, offload none: .* layers in CPU memory; batch 7$", lines[0])
    assert "forwards" in lines[1]
    assert re.match(r" +[\d,.]+ tokens/s expected: load .*; decode is limited by ", lines[2])
    assert re.match(r" +first token after 0:\d\d, 7 requests in 0:\d\d", lines[3])
    assert re.match(r" +takes [\d.]+ GiB of host memory", lines[4])
    assert re.search(r"\n +planned +measured\nhost memory in all +[\d.]+ GiB +[\d.]+ GiB", done.err)
    assert re.search(r"\nspeed +[\d,.]+ tokens/s +[\d,.]+ tokens/s", done.err)


def test_a_quiet_run_says_nothing_of_its_plan(model: Path) -> None:
    done = run_zeroinf(["-m", str(model), "--prompt", "word", "--max-new-tokens", "2", "-q"])
    assert (done.code, done.err) == (0, "")
