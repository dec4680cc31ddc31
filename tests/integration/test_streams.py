"""Independent streams: every launcher, uneven work, one answer a request, output in input order."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import Launcher, read_jsonl, run_zeroinf, write_jsonl
from tiers import full

ODD = "a $(touch trapped) `touch trapped` ;'\"&|*\\ b"
"""All that a shell would interpret."""

BATCHES = ["-b", "2", "--offload", "cpu"]


@pytest.fixture(scope="session")
def model(small_checkpoint: Callable[[str], Path]) -> Path:
    return small_checkpoint("llama")


def uneven_requests() -> list[dict[str, Any]]:
    """Nine requests; with two rows a batch, one rank is busy with the long one while the other does most."""
    lengths = [150, 3, 1, 7, 2, 12, 5, 1, 4]
    return [
        {"id": f"r{i}", "prompt": "word " * (1 + i % 4), "max_new_tokens": length, "ignore_eos": True}
        for i, length in enumerate(lengths)
    ]


@pytest.fixture(scope="session")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What one rank answers to the uneven requests, in the same batches."""
    folder = tmp_path_factory.mktemp("alone")
    requests = write_jsonl(folder / "in.jsonl", uneven_requests())
    done = run_zeroinf(
        ["-m", str(model), "-i", str(requests), "-o", str(folder / "out.jsonl"), *BATCHES, "--engine", "zero"]
    )
    assert done.code == 0, done.err
    return read_jsonl(folder / "out.jsonl")


@pytest.mark.parametrize(
    ("launcher", "engine"), [full("num-gpus", "stream"), ("deepspeed", "zero"), full("torchrun", "stream")]
)
def test_two_ranks_answer_each_request_once_in_input_order_as_one_rank_would(
    launcher: Launcher, engine: str, model: Path, alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / ODD
    folder.mkdir()
    (folder / "model").symlink_to(model)
    requests, out = write_jsonl(folder / "in.jsonl", uneven_requests()), folder / "out.jsonl"
    done = run_zeroinf(
        ["-m", str(folder / "model"), "-i", str(requests), "-o", str(out), *BATCHES, "--engine", engine],
        ranks=2,
        launcher=launcher,
    )
    assert done.code == 0, done.err
    assert "on each of 2 streams" in done.err
    assert done.err.count("loading weights") == 1, "one rank speaks"
    found = read_jsonl(out)
    assert [line["id"] for line in found] == [request["id"] for request in uneven_requests()]
    assert [line["completion_tokens"] for line in found] == [r["max_new_tokens"] for r in uneven_requests()]
    assert found == alone
    assert sorted(path.name for path in folder.iterdir()) == ["in.jsonl", "model", "out.jsonl", "out.jsonl.journal"]
    assert not Path("trapped").exists()


def test_a_rank_without_requests_keeps_the_other_company(model: Path) -> None:
    arguments = ["-m", str(model), "--prompt", ODD, "--engine", "zero"]
    done = run_zeroinf([*arguments, "--max-new-tokens", "5"], ranks=2, launcher="num-gpus")
    assert done.code == 0, done.err
    assert done.out.count(f"in={ODD}\nout=") == 1
    assert "1 done" in done.err
    assert not Path("trapped").exists()


def test_deepspeeds_launcher_refuses_the_flag_m_which_is_why_the_readme_says_module() -> None:
    deepspeed = Path(sys.executable).with_name("deepspeed")
    refused = subprocess.run(
        [str(deepspeed), "--num_gpus", "2", "-m", "zeroinf", "run", "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2
    assert "unrecognized arguments: -m" in refused.stderr


def test_standard_output_holds_results_only_and_standard_error_everything_else(model: Path) -> None:
    done = run_zeroinf(
        ["-m", str(model), "-i", "-", "--max-new-tokens", "2", "--benchmark", "-b", "2"],
        stdin='{"prompt": "one"}\nnot JSON\n{"prompt": "three", "id": "t"}\n{"prompt": "four", "temperature": -1}\n',
    )
    assert done.code == 5, done.err
    blocks = done.out.split("-" * 60 + "\n")
    assert [block.split("\nout=")[0] for block in blocks] == ["in=one", "in=three", ""]
    assert "refused: line 2: not JSON" in done.err
    assert "refused: line 4: temperature must lie between 0 and 100, not -1" in done.err
    assert "error: 2 of 4 requests were refused" in done.err
    for figure in (
        "Throughput per token including tokenize",
        "Start to ready to generate",
        "Tokenize and generate 4 tokens (bs=2)",
        "Start to finish",
    ):
        assert figure in done.err
    assert "one warm-up left out" in done.err
