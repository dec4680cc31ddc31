"""Greedy tokens under each baseline are those of plain transformers' `generate` on the same batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SharedFolder
from matrix import DRIVER_TIMEOUT_S, Cell, answer, check_tokens, drive

from zeroinf.engines.baselines.checkpoint_json import LISTING_NAME
from zeroinf.model.demo import demo_file
from zeroinf.model.gguf.convert import convert_gguf

# The first test of a worker waits for the driver.
pytestmark = pytest.mark.timeout(DRIVER_TIMEOUT_S + 60)

SMALL = ("llama", "opt", "bloom", "gpt_neox")
NAMES = (*SMALL, "demo")
ALONE = [
    (name, *how) for name in SMALL for how in (("resident", "none"), ("accelerate", "none"), ("accelerate", "nvme"))
]
ALONE += [("demo", "resident", "none"), ("demo", "accelerate", "nvme")]
POLICY = ["OPTDecoderLayer", ["self_attn.out_proj", "fc2"]]
# Parts are summed in another order than the whole: in float32 that shows in no token.
DTYPE = "float32"


@pytest.fixture(scope="session")
def models(small_checkpoint: Callable[[str], Path]) -> dict[str, str]:
    return {name: str(convert_gguf(demo_file()) if name == "demo" else small_checkpoint(name)) for name in NAMES}


def split(model: str, **parallel: object) -> Cell:
    return Cell(model, "none", engine="tensor-parallel", parallel=tuple(parallel.items()), dtype=DTYPE)


def saved(folder: Path, name: str) -> str:
    return str(folder / "saved" / name)


def listed(folder: Path, name: str) -> str:
    return str(Path(saved(folder, name)) / LISTING_NAME)


@pytest.fixture(scope="session")
def parts(shared_folder: SharedFolder) -> Path:
    """Where ranks save their parts."""
    return shared_folder("saved-parts", lambda folder: None)


@pytest.fixture(scope="session")
def on_two_ranks(models: dict[str, str], parts: Path, shared_folder: SharedFolder) -> Path:
    cells = [split(models["demo"]), split(models["opt"], injection_policy=[POLICY])]
    cells += [split(models[name], save_to=saved(parts, name)) for name in SMALL]
    cells += [split(models[name], checkpoint=listed(parts, name)) for name in SMALL]
    return shared_folder("driven-tensor-parallel", lambda folder: drive(folder, cells, ranks=2))


@pytest.fixture(scope="session")
def on_one_rank(models: dict[str, str], parts: Path, on_two_ranks: Path, shared_folder: SharedFolder) -> Path:
    cells = [Cell(models[name], offload, engine=engine) for name, engine, offload in ALONE]
    cells += [split(models[name], checkpoint=listed(parts, name)) for name in SMALL]
    return shared_folder("driven-baselines", lambda folder: drive(folder, cells, ranks=1))


@pytest.mark.parametrize(("name", "engine", "offload"), ALONE)
def test_tokens_equal_plain_transformers(
    name: str, engine: str, offload: str, models: dict[str, str], on_one_rank: Path
) -> None:
    check_tokens(answer(on_one_rank, Cell(models[name], offload, engine=engine)), models[name])


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_that_share_a_model_run_one_stream_with_the_tokens_of_plain_transformers(
    name: str, models: dict[str, str], parts: Path, on_two_ranks: Path
) -> None:
    cell = split(models[name]) if name == "demo" else split(models[name], save_to=saved(parts, name))
    check_tokens(answer(on_two_ranks, cell), models[name], DTYPE)


def test_an_injection_policy_of_the_users_own_gives_the_same_tokens(models: dict[str, str], on_two_ranks: Path) -> None:
    check_tokens(answer(on_two_ranks, split(models["opt"], injection_policy=[POLICY])), models["opt"], DTYPE)


@pytest.mark.parametrize("name", SMALL)
def test_parts_saved_by_two_ranks_are_loaded_by_two_and_by_one(
    name: str, models: dict[str, str], parts: Path, on_two_ranks: Path, on_one_rank: Path
) -> None:
    cell = split(models[name], checkpoint=listed(parts, name))
    for driven in (on_two_ranks, on_one_rank):
        check_tokens(answer(driven, cell), models[name], DTYPE)
