"""Greedy tokens of the stream engine on two ranks are those of plain transformers, wherever weights rest."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import SharedFolder
from matrix import DRIVER_TIMEOUT_S, PROMPTS, Cell, Driven, check_tokens, wide_checkpoint
from tiers import tiered

# The first test of a worker waits for the driver.
pytestmark = pytest.mark.timeout(DRIVER_TIMEOUT_S + 60)

# Blocks of several MiB, so that each rank really has a part of every piece.
MODELS = ("llama", "gpt_neox", "mixtral")
WAYS = (
    ("none", "auto"),
    ("cpu", "replicated"),
    ("cpu", "partitioned"),
    ("nvme", "replicated"),
    ("nvme", "partitioned"),
)
CELLS = [(name, *way) for name in MODELS for way in WAYS]
DEFAULT = [*(("llama", *way) for way in WAYS), ("mixtral", "cpu", "partitioned")]
AUTO = {"offload": "cpu", "engine": "stream", "fetch": "partitioned", "batch_size": None}


@pytest.fixture(scope="session")
def models(shared_folder: SharedFolder) -> dict[str, Path]:
    return {name: wide_checkpoint(shared_folder, name) for name in MODELS}


@pytest.fixture(scope="session")
def driven(models: dict[str, Path], shared_folder: SharedFolder) -> Driven:
    auto = Cell(str(models["llama"]), **AUTO)
    cells, default = (
        [*(Cell(str(models[name]), offload, "stream", fetch) for name, offload, fetch in each), auto]
        for each in (CELLS, DEFAULT)
    )
    return Driven("stream-two-ranks", cells, default, 2, shared_folder)


@pytest.mark.parametrize(("name", "offload", "fetch"), tiered(CELLS, DEFAULT))
def test_tokens_equal_plain_transformers(
    name: str, offload: str, fetch: str, models: dict[str, Path], driven: Driven
) -> None:
    found = driven.answer(Cell(str(models[name]), offload, "stream", fetch))
    check_tokens(found, str(models[name]))
    assert sorted(index for rows in found.rows_by_rank for index in rows) == list(range(len(PROMPTS)))


def test_few_requests_are_shared_equally_where_the_planner_chooses_the_batch(
    models: dict[str, Path], driven: Driven
) -> None:
    found = driven.answer(Cell(str(models["llama"]), **AUTO))
    assert sorted(len(rows) for rows in found.rows_by_rank) == [len(PROMPTS) // 2, len(PROMPTS) - len(PROMPTS) // 2]
    check_tokens(found, str(models["llama"]))


@pytest.mark.parametrize("fetch", ["replicated", "partitioned"])
@pytest.mark.parametrize("name", tiered(MODELS, ("llama",)))
def test_two_ranks_write_one_store(name: str, fetch: str, models: dict[str, Path], driven: Driven) -> None:
    weights = sum(file.stat().st_size for file in models[name].glob("*.safetensors"))
    on_disk = driven.answer(Cell(str(models[name]), "nvme", "stream", fetch)).bytes_on_disk
    assert weights < on_disk < 1.2 * weights + (4 << 20)
