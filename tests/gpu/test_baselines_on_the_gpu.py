"""Every baseline prints on a GPU what the stream engine prints, and moves the weights that it is said to move."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import run_zeroinf
from small_models import make_checkpoint

pytestmark = pytest.mark.gpu

PROMPTS = ("one", "another prompt", "three")
WAYS = (
    ("resident", "none", ()),
    ("accelerate", "none", ()),
    ("accelerate", "cpu", ("--resident-blocks", "1")),
    ("accelerate", "nvme", ("--resident-blocks", "0")),
    ("tensor-parallel", "none", ()),
)


def run(folder: Path, engine: str, offload: str, *more: str) -> tuple[str, dict[str, object]]:
    words = ["-m", str(folder), "--engine", engine, "--offload", offload, "--max-new-tokens", "12", "-b", "3", *more]
    words += ["--nvme-path", str(folder.parent)] if offload == "nvme" else []
    words += ["--report", str(folder.parent / "report.json")]
    done = run_zeroinf([*words, *(word for prompt in PROMPTS for word in ("--prompt", prompt))], timeout=240)
    assert done.code == 0, done.err
    return done.out, json.loads((folder.parent / "report.json").read_text())


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_every_baseline_prints_the_same(name: str, tmp_path: Path) -> None:
    folder = make_checkpoint(name, tmp_path / name)
    wanted, _ = run(folder, "stream", "none")
    assert wanted.count("out=") == len(PROMPTS)
    for engine, offload, more in WAYS:
        printed, report = run(folder, engine, offload, *more)
        assert printed == wanted, (engine, offload)
        assert bool(report["streamed_bytes"]) == (offload != "none"), (engine, offload)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_that_share_a_model_print_the_same(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path / "llama")
    wanted, _ = run(folder, "stream", "none")
    assert run(folder, "tensor-parallel", "none", "--num-gpus", "2")[0] == wanted
