"""Weights that cross as codes give the tokens of plain transformers with weights after the same round trip."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SharedFolder
from ranks import on_ranks
from test_stream_tokens import plain_tokens, stream, tokens_of
from tiers import tiered
from wire_reference import save_through_codes

from zeroinf.distributed.control import Control
from zeroinf.engines.stream.manage_stores import list_stores
from zeroinf.planner.wire import Wire

ARCHITECTURES = ("llama_tied", "mixtral", "gpt2", "gptj", "gpt_neox", "deepseek_v3", "gpt_oss")


@pytest.fixture(scope="session")
def after_codes(shared_folder: SharedFolder, small_checkpoint: Callable[[str], Path]) -> Callable[[str, Wire], Path]:
    """`after_codes(architecture, wire)`: a small checkpoint whose weights have made the round trip already."""

    def get(name: str, wire: Wire) -> Path:
        return shared_folder(
            f"{wire}-{name}", lambda folder: save_through_codes(small_checkpoint(name), wire, folder) and None
        )

    return get


def tokens(folder: Path, **where: Any) -> list[list[int]]:
    engine = stream(folder, **where)
    try:
        return tokens_of(engine, batches=2)
    finally:
        engine.close()


@pytest.mark.parametrize("wire", ["int8", "int4"])
@pytest.mark.parametrize("name", tiered(ARCHITECTURES, ("llama_tied", "mixtral", "gpt2", "deepseek_v3")))
def test_tokens_are_those_of_weights_after_the_round_trip(
    name: str, wire: Wire, small_checkpoint: Callable[[str], Path], after_codes: Callable[[str, Wire], Path]
) -> None:
    assert tokens(small_checkpoint(name), wire=wire) == plain_tokens(after_codes(name, wire))


@pytest.mark.parametrize(("resident", "nvme"), [(3, 0), (1, 0), (0, 3), (1, 1)])
@pytest.mark.parametrize(("name", "wire"), [("llama", "int8"), ("mixtral", "int4")])
def test_tokens_do_not_depend_on_where_coded_weights_rest(
    name: str, resident: int, nvme: int, wire: Wire, small_checkpoint: Callable[[str], Path],
    after_codes: Callable[[str, Wire], Path], tmp_path: Path,
) -> None:  # fmt: skip
    offload = "nvme" if nvme else "none" if resident == 3 else "cpu"
    where = {"offload": offload, "resident_blocks": resident, "nvme_blocks": nvme, "wire": wire}
    paths = (tmp_path,) if nvme else ()
    for _ in range(2 if nvme else 1):  # the store is written, and found again
        assert tokens(small_checkpoint(name), nvme_paths=paths, **where) == plain_tokens(after_codes(name, wire))


def test_two_ranks_that_gather_codes_give_the_same_tokens(
    small_checkpoint: Callable[[str], Path], after_codes: Callable[[str, Wire], Path]
) -> None:
    folder = small_checkpoint("mixtral")

    def rank(control: Control) -> list[list[int]]:
        torch.set_num_threads(1)
        return tokens_of(stream(folder, wire="int4", fetch="partitioned", world_size=2, control=control))

    found, codes = on_ranks(2, rank)
    assert codes == [0, 0]
    assert found == [plain_tokens(after_codes("mixtral", "int4"))] * 2


def test_each_format_has_a_store_of_its_own(small_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = small_checkpoint("llama")
    for wire in ("model", "int8", "int4", "int4"):
        stream(folder, offload="nvme", nvme_blocks=3, nvme_paths=(tmp_path,), wire=wire).close()
    stores = list_stores([tmp_path])
    assert sorted(str(store.wire) for store in stores) == ["int4", "int8", "model"]
    assert all(store.state == "whole" for store in stores)


def test_coded_blocks_are_small_wherever_they_rest_and_one_slot_holds_the_expanded_one(
    small_checkpoint: Callable[[str], Path],
) -> None:
    folder = small_checkpoint("llama")
    whole, coded = (stream(folder, "bfloat16", wire=wire).stats() for wire in ("model", "int4"))
    piece, full = coded.streamed_bytes_per_pass // 3, whole.streamed_bytes_per_pass // 3
    assert piece < 0.35 * full
    assert coded.slot_bytes == 3 * piece + full
    assert coded.shared_host_bytes == 3 * piece
