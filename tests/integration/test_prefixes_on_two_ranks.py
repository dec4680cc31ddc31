"""Ranks that run streams of their own share what the prompts of each begin with, and give the tokens of one rank."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from launching import read_jsonl, write_jsonl
from ranks import on_ranks

from zeroinf.distributed.control import Control
from zeroinf.distributed.world import World
from zeroinf.generation.row import Sampling
from zeroinf.options.options import RunOptions
from zeroinf.runs.runner import run_job


class Deaf:
    """An observer that hears nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *heard: None


def test_replicated_ranks_share_prefixes_and_give_the_tokens_of_one_rank(
    small_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    prompts = ["header word " * 6 + f"{number} {number * 7}" for number in range(24)]
    requests = write_jsonl(tmp_path / "in.jsonl", [{"prompt": prompt} for prompt in prompts])

    def run(world: World, out: str, **more: Any) -> Any:
        asked: dict[str, Any] = {"offload": "cpu", "dtype": "float32", "resident_blocks": 0, "batch_size": 4, **more}
        options = RunOptions(
            model=str(small_checkpoint("llama")),
            sampling=Sampling(max_new_tokens=3, ignore_eos=True),
            input_files=(str(requests),),
            output_file=tmp_path / out,
            **asked,
        )
        return run_job(options, world, torch.device("cpu"), io.StringIO(), Deaf())  # type: ignore[arg-type]

    def body(control: Control) -> int | None:
        outcome = run(control.world, "two.jsonl", fetch="replicated")
        return None if outcome is None else outcome.report.shared_prompt_tokens

    alone = run(World(), "one.jsonl", share_prefixes=False)
    (shared, other), codes = on_ranks(2, body)
    assert (other, codes) == (None, [0, 0])
    found = [line["completion"] for line in read_jsonl(tmp_path / "two.jsonl")]
    assert found == [line["completion"] for line in read_jsonl(tmp_path / "one.jsonl")]
    assert alone.report.shared_prompt_tokens == 0
    assert shared >= 16 * 4 * 8, "each rank computes the four pages of the header once, and most sequences find them"
