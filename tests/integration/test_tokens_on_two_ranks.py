"""Greedy tokens under ZeRO-3 on two ranks, each with its own batches, are those of plain transformers' `generate`."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import SharedFolder
from matrix import DRIVER_TIMEOUT_S, PROMPTS, WIDE_ARCHITECTURES, Cell, Driven, check_tokens, wide_checkpoint
from tiers import tiered

from zeroinf.model.demo import demo_file
from zeroinf.model.gguf.convert import convert_gguf

# The first test of a worker waits for the driver.
pytestmark = pytest.mark.timeout(DRIVER_TIMEOUT_S + 60)

WIDE = [*((name, offload) for name in WIDE_ARCHITECTURES for offload in ("cpu", "nvme")), ("gpt_neox", "none")]
CELLS = [*WIDE, ("demo", "cpu")]
DEFAULT = [("llama", "cpu"), ("llama", "nvme")]


@pytest.fixture(scope="session")
def models(shared_folder: SharedFolder) -> dict[str, Path]:
    wide = {name: wide_checkpoint(shared_folder, name) for name in WIDE_ARCHITECTURES}
    return {**wide, "demo": convert_gguf(demo_file())}


@pytest.fixture(scope="session")
def driven(models: dict[str, Path], shared_folder: SharedFolder) -> Driven:
    cells, default = ([Cell(str(models[name]), offload) for name, offload in each] for each in (CELLS, DEFAULT))
    return Driven("two-ranks", cells, default, 2, shared_folder)


@pytest.mark.parametrize(("name", "offload"), tiered(CELLS, DEFAULT))
def test_tokens_equal_plain_transformers(name: str, offload: str, models: dict[str, Path], driven: Driven) -> None:
    found = driven.answer(Cell(str(models[name]), offload))
    assert found.partitioned
    check_tokens(found, str(models[name]))


@pytest.mark.parametrize(("name", "offload"), tiered(WIDE, DEFAULT))
def test_both_ranks_answer_and_make_as_many_forwards(
    name: str, offload: str, models: dict[str, Path], driven: Driven
) -> None:
    found = driven.answer(Cell(str(models[name]), offload))
    assert all(found.rows_by_rank)
    assert sorted(index for rows in found.rows_by_rank for index in rows) == list(range(len(PROMPTS)))
    assert len(set(found.forwards)) == 1


@pytest.mark.parametrize("name", tiered(WIDE_ARCHITECTURES, ("llama",)))
def test_ranks_share_the_weights_on_disk(name: str, models: dict[str, Path], driven: Driven) -> None:
    weights = sum(file.stat().st_size for file in models[name].glob("*.safetensors"))
    cell = Cell(str(models[name]), "nvme")
    assert weights / 2 < driven.answer(cell).bytes_on_disk < 1.5 * weights
    assert not list((driven.folder(cell) / "nvme").rglob("zeroinf-swap-*"))
