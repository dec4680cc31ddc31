"""Rows of a matrix are read from where they lie in safetensors files, whichever file holds them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_models import small_config
from torch import nn

from zeroinf.engines.stream.row_files import RowFiles
from zeroinf.errors import ModelError
from zeroinf.model.checkpoint import read_facts
from zeroinf.model.source import StoredRows
from zeroinf.model.stored_rows import find_rows
from zeroinf.model.weights import held_tensors

WIDTH = 24


@pytest.fixture
def parts(tmp_path: Path) -> tuple[list[Path], torch.Tensor]:
    """A matrix in 12 parts over two files, among other tensors, and all of it."""
    parts = {f"grams.shard_{number}.weight": torch.randn(7 + number, WIDTH) for number in range(12)}
    files = [tmp_path / "model-1.safetensors", tmp_path / "model-2.safetensors"]
    for turn, file in enumerate(files):
        save_file({f"a{turn}": torch.ones(turn + 1), **dict(list(parts.items())[turn::2])}, file)
    return files, torch.cat(list(parts.values()))


def opened(files: list[Path], shape: torch.Size) -> tuple[RowFiles, tuple[StoredRows, ...]]:
    held = held_tensors("m", files)
    rows = find_rows(torch.empty(shape, device="meta"), [name for name in held if name.startswith("grams")], held)
    return RowFiles({"grams": rows}), rows


def test_each_row_is_read_once_from_the_part_that_has_it(parts: tuple[list[Path], torch.Tensor]) -> None:
    files, whole = parts
    reader, rows = opened(files, whole.shape)
    assert [part.rows for part in rows] == [7 + number for number in range(12)], "2 comes before 10"
    numbers = torch.randint(len(whole), (500,))
    found, places = reader.read("grams", numbers)
    assert len(found) == len(set(numbers.tolist())) == reader.rows_read
    assert torch.equal(found[places], whole[numbers])
    assert torch.equal(reader.read("grams", torch.tensor([0, len(whole) - 1]))[0], whole[[0, -1]])
    nothing, _ = reader.read("grams", torch.empty(0, dtype=torch.int64))
    assert nothing.shape == (0, WIDTH)
    reader.close()


@pytest.mark.parametrize("number", [-1, 150])
def test_a_row_that_is_not_there_is_an_error(number: int, parts: tuple[list[Path], torch.Tensor]) -> None:
    files, whole = parts
    reader, _ = opened(files, whole.shape)
    with pytest.raises(IndexError, match="150 rows"):
        reader.read("grams", torch.tensor([3, number]))
    reader.close()


def test_a_file_that_is_too_short_is_refused_by_name(parts: tuple[list[Path], torch.Tensor]) -> None:
    files, whole = parts
    _, rows = opened(files, whole.shape)
    with files[1].open("r+b") as file:
        file.truncate(files[1].stat().st_size - 8)
    with pytest.raises(ModelError, match=r"model-2\.safetensors ends before the data"):
        RowFiles({"grams": rows})


def test_what_is_not_rows_of_one_dtype_cannot_be_read_by_row(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3, 8), "b": torch.ones(3, 8, dtype=torch.float16), "c": torch.ones(6, 4)}, file)
    held = held_tensors("m", [file])
    wanted = torch.empty(6, 8, device="meta")
    for names in (["a"], ["a", "b"], ["c"]):
        assert find_rows(wanted, names, held) == ()


def test_the_facts_of_a_checkpoint_say_where_rows_of_embeddings_lie(tmp_path: Path) -> None:
    config = small_config("llama")
    model = _saved(config, tmp_path)
    (rows,) = read_facts("m", config, [tmp_path / "model.safetensors"]).rows["model.embed_tokens.weight"]
    assert (rows.name, rows.rows, rows.dtype) == ("model.embed_tokens.weight", 384, "float32")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert not read_facts("m", config, [tmp_path / "pytorch_model.bin"]).rows, "its files are pickled"


def _saved(config: object, folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)  # type: ignore[operator]
    return model
