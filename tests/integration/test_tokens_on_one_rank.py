"""Greedy tokens under ZeRO-3 on one rank are those of plain transformers' `generate` on the same batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SharedFolder
from matrix import BATCH_SIZE, DRIVER_TIMEOUT_S, WIDE_ARCHITECTURES, Cell, answer, check_tokens, drive, wide_checkpoint

from zeroinf.model.demo import demo_file
from zeroinf.model.gguf.convert import convert_gguf

# The first test of a worker waits for the driver.
pytestmark = pytest.mark.timeout(DRIVER_TIMEOUT_S + 60)

OFFLOADS = ("none", "cpu", "nvme")
CELLS = [*((name, offload) for name in WIDE_ARCHITECTURES for offload in OFFLOADS), ("demo", "nvme")]
# Beside the wide ones, one of each kind of attention, cache and block that transformers has.
MORE = ("deepseek_v3", "falcon", "gemma2", "gpt2", "gptj", "lfm2", "mamba", "mpt", "phi3", "qwen3_moe")


@pytest.fixture(scope="session")
def models(shared_folder: SharedFolder, small_checkpoint: Callable[[str], Path]) -> dict[str, Path]:
    wide = {name: wide_checkpoint(shared_folder, name) for name in WIDE_ARCHITECTURES}
    small = {name: small_checkpoint(name) for name in MORE}
    return {**wide, **small, "demo": convert_gguf(demo_file())}


@pytest.fixture(scope="session")
def driven(models: dict[str, Path], shared_folder: SharedFolder) -> Path:
    cells = [Cell(str(models[name]), offload) for name, offload in CELLS]
    cells += [Cell(str(models[name]), "cpu") for name in MORE]
    return shared_folder("driven-one-rank", lambda folder: drive(folder, cells, ranks=1))


@pytest.mark.parametrize(("name", "offload"), CELLS)
def test_tokens_equal_plain_transformers(name: str, offload: str, models: dict[str, Path], driven: Path) -> None:
    found = answer(driven, Cell(str(models[name]), offload))
    assert found.partitioned
    assert found.batch_size == BATCH_SIZE
    check_tokens(found, str(models[name]))


@pytest.mark.parametrize("name", MORE)
def test_tokens_equal_plain_transformers_with_weights_in_host_memory(
    name: str, models: dict[str, Path], driven: Path
) -> None:
    found = answer(driven, Cell(str(models[name]), "cpu"))
    assert found.partitioned
    check_tokens(found, str(models[name]))


@pytest.mark.parametrize("name", WIDE_ARCHITECTURES)
def test_end_of_sequence_ends_some_rows_of_a_batch_before_others(
    name: str, models: dict[str, Path], driven: Path
) -> None:
    found = answer(driven, Cell(str(models[name]), "cpu"))
    assert set(found.finish.values()) == {"stop", "length"}
    assert len({len(tokens) for tokens in found.tokens.values()}) > 1


@pytest.mark.parametrize("name", WIDE_ARCHITECTURES)
def test_weights_lie_on_disk_with_nvme_only_and_are_removed_afterwards(
    name: str, models: dict[str, Path], driven: Path
) -> None:
    weights = sum(file.stat().st_size for file in models[name].glob("*.safetensors"))
    on_disk = answer(driven, Cell(str(models[name]), "nvme")).bytes_on_disk
    assert weights / 2 < on_disk < 2 * weights
    assert answer(driven, Cell(str(models[name]), "cpu")).bytes_on_disk == 0
    assert not list((driven / "nvme").rglob("zeroinf-swap-*"))
