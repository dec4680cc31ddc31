"""The card's example: a model of pythia-160m's true shape, its weights on disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from matrix import DRIVER_TIMEOUT_S, Cell, answer, check_tokens, drive

from zeroinf.model.catalog import catalog_config

pytestmark = [pytest.mark.timeout(DRIVER_TIMEOUT_S + 60), pytest.mark.full]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    import torch
    from small_models import build_tokenizer
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("pythia") / "pythia-160m"
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(catalog_config("pythia-160m"), dtype=torch.float32)
    assert sum(parameter.numel() for parameter in plain.parameters()) == 162_322_944
    plain.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    yield folder
    shutil.rmtree(folder)


def test_tokens_equal_plain_transformers_at_pythias_true_shape(model: Path, tmp_path: Path) -> None:
    cell = Cell(str(model), "nvme")
    drive(tmp_path, [cell], ranks=1)
    found = answer(tmp_path, cell)
    check_tokens(found, str(model))
    assert found.bytes_on_disk > 600_000_000
