"""Greedy tokens under each baseline are those of plain transformers' `generate` on the same batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import SharedFolder
from matrix import DRIVER_TIMEOUT_S, Cell, Driven, check_tokens
from tiers import tiered

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
ALONE_DEFAULT = [("llama", "resident", "none"), ("llama", "accelerate", "none"), ("llama", "accelerate", "nvme")]
ALONE_DEFAULT += [("demo", "resident", "none")]
SPLIT_DEFAULT = ("llama",)
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
def on_two_ranks(models: dict[str, str], parts: Path, shared_folder: SharedFolder) -> Driven:
    def cells(names: Sequence[str]) -> list[Cell]:
        found = [split(models[name], save_to=saved(parts, name)) for name in names]
        found += [split(models[name], checkpoint=listed(parts, name)) for name in names]
        return [*found, split(models["opt"], injection_policy=[POLICY])]

    return Driven("tensor-parallel", [*cells(SMALL), split(models["demo"])], cells(SPLIT_DEFAULT), 2, shared_folder)


@pytest.fixture(scope="session")
def on_one_rank(models: dict[str, str], shared_folder: SharedFolder) -> Driven:
    cells, default = (
        [Cell(models[name], offload, engine=engine) for name, engine, offload in each]
        for each in (ALONE, ALONE_DEFAULT)
    )
    return Driven("baselines", cells, default, 1, shared_folder)


@pytest.fixture(scope="session")
def parts_on_one_rank(models: dict[str, str], parts: Path, shared_folder: SharedFolder) -> Driven:
    """Cells that load what `on_two_ranks` has saved."""
    cells, default = (
        [split(models[name], checkpoint=listed(parts, name)) for name in names] for names in (SMALL, SPLIT_DEFAULT)
    )
    return Driven("saved-parts-on-one-rank", cells, default, 1, shared_folder)


@pytest.mark.parametrize(("name", "engine", "offload"), tiered(ALONE, ALONE_DEFAULT))
def test_tokens_equal_plain_transformers(
    name: str, engine: str, offload: str, models: dict[str, str], on_one_rank: Driven
) -> None:
    check_tokens(on_one_rank.answer(Cell(models[name], offload, engine=engine)), models[name])


@pytest.mark.parametrize("name", tiered(NAMES, SPLIT_DEFAULT))
def test_two_ranks_that_share_a_model_run_one_stream_with_the_tokens_of_plain_transformers(
    name: str, models: dict[str, str], parts: Path, on_two_ranks: Driven
) -> None:
    cell = split(models[name]) if name == "demo" else split(models[name], save_to=saved(parts, name))
    check_tokens(on_two_ranks.answer(cell), models[name], DTYPE)


def test_an_injection_policy_of_the_users_own_gives_the_same_tokens(
    models: dict[str, str], on_two_ranks: Driven
) -> None:
    check_tokens(on_two_ranks.answer(split(models["opt"], injection_policy=[POLICY])), models["opt"], DTYPE)


@pytest.mark.parametrize("name", tiered(SMALL, SPLIT_DEFAULT))
def test_parts_saved_by_two_ranks_are_loaded_by_two_and_by_one(
    name: str, models: dict[str, str], parts: Path, on_two_ranks: Driven, parts_on_one_rank: Driven
) -> None:
    cell = split(models[name], checkpoint=listed(parts, name))
    for driven in (on_two_ranks, parts_on_one_rank):
        check_tokens(driven.answer(cell), models[name], DTYPE)
