"""Wherever blocks rest, on the device, in host memory or in a store, tokens are those of plain transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_stream_tokens import NEW_TOKENS, plain_tokens, stream, tokens_of

ARCHITECTURES = ("llama", "llama_tied", "gptj", "gpt_neo", "mixtral", "deepseek_v3", "lfm2", "mamba", "jamba", "bloom")


def blocks_of(folder: Path) -> int:
    from zeroinf.model.inspect import read_anatomy
    from zeroinf.model.source import resolve_model

    return len(read_anatomy(resolve_model(str(folder)).config).blocks)


def check(folder: Path, **where: Any) -> None:
    engine = stream(folder, **where)
    try:
        assert tokens_of(engine, batches=2) == plain_tokens(folder)
        assert engine.stats().forwards == 2 * NEW_TOKENS
    finally:
        engine.close()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tokens_with_all_weights_on_the_device(name: str, small_checkpoint: Callable[[str], Path]) -> None:
    folder = small_checkpoint(name)
    check(folder, offload="none", resident_blocks=blocks_of(folder))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tokens_with_all_weights_in_a_store_written_and_found_again(
    name: str, small_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = small_checkpoint(name)
    for _ in range(2):
        check(folder, offload="nvme", nvme_blocks=blocks_of(folder), nvme_paths=(tmp_path,))


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "gptj"])
@pytest.mark.parametrize(("resident", "nvme"), [(0, 1), (1, 0), (1, 1), (2, 1), (0, 2), (1, 2)])
def test_tokens_with_blocks_on_several_tiers(
    resident: int, nvme: int, name: str, small_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    check(
        small_checkpoint(name),
        offload="nvme" if nvme else "cpu",
        resident_blocks=resident,
        nvme_blocks=nvme,
        nvme_paths=(tmp_path,) if nvme else (),
    )


def test_all_resident_leaves_no_weights_in_host_memory_and_moves_none(small_checkpoint: Callable[[str], Path]) -> None:
    folder = small_checkpoint("llama")
    stats = stream(folder, offload="none", resident_blocks=blocks_of(folder)).stats()
    assert (stats.streamed_bytes_per_pass, stats.shared_host_bytes, stats.slot_bytes) == (0, 0, 0)


def test_resident_blocks_do_not_stream(small_checkpoint: Callable[[str], Path]) -> None:
    folder = small_checkpoint("llama")
    streamed = [stream(folder, resident_blocks=n).stats().streamed_bytes_per_pass for n in range(4)]
    assert streamed[0] % 3 == streamed[3] == 0
    assert [streamed[0] - s for s in streamed] == [n * streamed[0] // 3 for n in range(4)]
