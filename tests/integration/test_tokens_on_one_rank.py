"""Greedy tokens under ZeRO-3 on one rank are those of plain transformers' `generate` on the same batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SharedFolder
from matrix import BATCH_SIZE, DRIVER_TIMEOUT_S, WIDE_ARCHITECTURES, Cell, Driven, check_tokens, wide_checkpoint
from tiers import tiered

from zeroinf.model.demo import demo_file
from zeroinf.model.gguf.convert import convert_gguf

# The first test of a worker waits for the driver.
pytestmark = pytest.mark.timeout(DRIVER_TIMEOUT_S + 60)

OFFLOADS = ("none", "cpu", "nvme")
CELLS = [*((name, offload) for name in WIDE_ARCHITECTURES for offload in OFFLOADS), ("demo", "nvme")]
DEFAULT = [*(("llama", offload) for offload in OFFLOADS), ("mixtral", "cpu")]
# Beside the wide ones, one of each kind of attention, cache and block that transformers has.
MORE = ("deepseek_v3", "falcon", "gemma2", "gpt2", "gptj", "lfm2", "mamba", "mpt", "phi3", "qwen3_moe")
MORE_DEFAULT = ("deepseek_v3", "gpt2", "lfm2")


@pytest.fixture(scope="session")
def models(shared_folder: SharedFolder, small_checkpoint: Callable[[str], Path]) -> dict[str, Path]:
    wide = {name: wide_checkpoint(shared_folder, name) for name in WIDE_ARCHITECTURES}
    small = {name: small_checkpoint(name) for name in MORE}
    return {**wide, **small, "demo": convert_gguf(demo_file())}


@pytest.fixture(scope="session")
def driven(models: dict[str, Path], shared_folder: SharedFolder) -> Driven:
    cells, default = (
        [Cell(str(models[name]), offload) for name, offload in (*wide, *((name, "cpu") for name in more))]
        for wide, more in ((CELLS, MORE), (DEFAULT, MORE_DEFAULT))
    )
    return Driven("one-rank", cells, default, 1, shared_folder)


@pytest.mark.parametrize(("name", "offload"), tiered(CELLS, DEFAULT))
def test_tokens_equal_plain_transformers(name: str, offload: str, models: dict[str, Path], driven: Driven) -> None:
    found = driven.answer(Cell(str(models[name]), offload))
    assert found.partitioned
    assert found.batch_size == BATCH_SIZE
    check_tokens(found, str(models[name]))


@pytest.mark.parametrize("name", tiered(MORE, MORE_DEFAULT))
def test_tokens_equal_plain_transformers_with_weights_in_host_memory(
    name: str, models: dict[str, Path], driven: Driven
) -> None:
    found = driven.answer(Cell(str(models[name]), "cpu"))
    assert found.partitioned
    check_tokens(found, str(models[name]))


@pytest.mark.parametrize("name", tiered(WIDE_ARCHITECTURES, ("llama", "mixtral")))
def test_end_of_sequence_ends_some_rows_of_a_batch_before_others(
    name: str, models: dict[str, Path], driven: Driven
) -> None:
    found = driven.answer(Cell(str(models[name]), "cpu"))
    assert set(found.finish.values()) == {"stop", "length"}
    assert len({len(tokens) for tokens in found.tokens.values()}) > 1


@pytest.mark.parametrize("name", tiered(WIDE_ARCHITECTURES, ("llama",)))
def test_weights_lie_on_disk_with_nvme_only_and_are_removed_afterwards(
    name: str, models: dict[str, Path], driven: Driven
) -> None:
    weights = sum(file.stat().st_size for file in models[name].glob("*.safetensors"))
    on_disk = driven.answer(Cell(str(models[name]), "nvme")).bytes_on_disk
    assert weights / 2 < on_disk < 2 * weights
    assert driven.answer(Cell(str(models[name]), "cpu")).bytes_on_disk == 0
    folder = driven.folder(Cell(str(models[name]), "nvme"))
    assert not list((folder / "nvme").rglob("zeroinf-swap-*"))
