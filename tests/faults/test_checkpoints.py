"""Checkpoints that are damaged, or pickles that would run code, are refused by every engine, and run nothing."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fake_job import exit_code, in_child
from transformers import AutoModelForCausalLM

from zeroinf.distributed.control import Control
from zeroinf.distributed.world import World
from zeroinf.engines.base import SilentListener
from zeroinf.engines.loading import load_engine
from zeroinf.errors import ModelError
from zeroinf.generation.row import Sampling
from zeroinf.model.resolve import resolve_model
from zeroinf.options.options import RunOptions
from zeroinf.planner.plan import TensorParallel
from zeroinf.runs.prepare import prepare, read_job

ENGINES = [
    ("stream", "cpu"),
    ("stream", "nvme"),
    ("zero", "cpu"),
    ("accelerate", "nvme"),
    ("resident", "none"),
    ("tensor-parallel", "none"),
]


class _Malicious:
    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self._marker}",)


@pytest.fixture
def folder(small_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a checkpoint, to be damaged."""
    return Path(shutil.copytree(small_checkpoint("llama"), tmp_path / "model"))


def load(folder: Path, engine: str, offload: str, listing: Path | None = None) -> None:
    """What a run does until its weights are there."""
    world = World()
    options = RunOptions(
        model=str(folder),
        sampling=Sampling(max_new_tokens=1),
        dtype="float32",
        engine=engine,
        offload=offload,  # type: ignore[arg-type]
        nvme_paths=(folder.parent,) if offload == "nvme" else (),
        prompts=("x",),
        tensor_parallel=TensorParallel(size=0, checkpoint=listing),
    )
    source = resolve_model(options.model)
    reading = read_job(options, source, "cpu")
    prepared = prepare(options, source, reading, reading.job.work, world, "cpu")
    control = Control(world, "cpu")
    load_engine(prepared.plan, source, prepared.zero_config, control, torch.device("cpu"), SilentListener()).close()


def refusal(folder: Path, engine: str, offload: str, listing: Path | None = None) -> str:
    """The words that end a run while it loads. It is a process of its own, since DeepSpeed leaves traces in one."""
    words = folder / "words"

    def body() -> int:
        try:
            load(folder, engine, offload, listing)
        except ModelError as error:
            words.write_text(error.message)
        return 0

    assert exit_code(in_child(body)) == 0
    return words.read_text()


def pickle_with_code(folder: Path, name: str, marker: Path) -> None:
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    torch.save({**weights, "payload": _Malicious(marker)}, folder / name)


@pytest.mark.parametrize(("engine", "offload"), ENGINES)
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(
    engine: str, offload: str, folder: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "it-ran"
    pickle_with_code(folder, "pytorch_model.bin", marker)
    (folder / "model.safetensors").unlink()
    assert "hold more than weights, and could run code" in refusal(folder, engine, offload)
    assert not marker.exists()


def test_so_is_one_that_a_listing_names(folder: Path, tmp_path: Path) -> None:
    marker, listing = tmp_path / "it-ran", folder / "listing.json"
    pickle_with_code(folder, "part.pt", marker)
    listing.write_text('{"type": "ds_model", "checkpoints": {"non_tp": ["part.pt"]}}')
    words = refusal(folder, "tensor-parallel", "none", listing)
    assert "part.pt: it holds more than weights, and could run code" in words
    assert not marker.exists()


@pytest.mark.parametrize(("engine", "offload"), ENGINES)
def test_weights_that_are_cut_off_are_refused(engine: str, offload: str, folder: Path) -> None:
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    words = refusal(folder, engine, offload)
    assert re.fullmatch(f"the weights of {folder} are damaged: .*file not fully covered", words)


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("is_archive", [True, False])
@pytest.mark.parametrize(("engine", "offload"), [("stream", "cpu"), ("zero", "cpu"), ("resident", "none")])
def test_pickles_that_are_cut_off_are_refused(
    engine: str, offload: str, folder: Path, is_archive: bool, kept: float
) -> None:
    weights = folder / "pytorch_model.bin"
    made = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    torch.save(made, weights, _use_new_zipfile_serialization=is_archive)
    os.truncate(weights, int(kept * weights.stat().st_size))
    (folder / "model.safetensors").unlink()
    assert f"the weights of {folder} are damaged" in refusal(folder, engine, offload)
