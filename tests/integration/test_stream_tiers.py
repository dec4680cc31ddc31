"""Wherever blocks rest, on the device, in host memory or in a store, tokens are those of plain transformers."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_machines import overhead, shape_of, workload_of
from generating import greedy_by_transformers
from test_stream_tokens import NEW_TOKENS, PROMPTS, counted_host_memory, plain_tokens, stream, tokens_of
from tiers import tiered
from tiny_models import build_tiny
from transformers import AutoModelForImageTextToText

from zeroinf.engines.base import SilentListener
from zeroinf.engines.stream import data_files, early_trials, read_ahead, weights
from zeroinf.engines.stream.stream_memory import stream_gpu_terms, stream_host_terms
from zeroinf.engines.stream.tensor_groups import group_tensors
from zeroinf.model.inspect import read_anatomy
from zeroinf.model.resolve import resolve_model
from zeroinf.planner.choice import Choice
from zeroinf.planner.walks import walks

ARCHITECTURES = ("llama", "llama_tied", "gptj", "gpt_neo", "mixtral", "deepseek_v3", "lfm2", "mamba", "jamba", "bloom")
DEFAULT = ("llama_tied", "mixtral", "deepseek_v3", "jamba")


def blocks_of(folder: Path) -> int:
    return len(read_anatomy(resolve_model(str(folder)).config).blocks)


def check(folder: Path, **where: Any) -> None:
    engine = stream(folder, **where)
    try:
        assert tokens_of(engine, batches=2) == plain_tokens(folder)
        assert engine.stats().passes == 2 * NEW_TOKENS
    finally:
        engine.close()


@pytest.mark.parametrize("name", tiered(ARCHITECTURES, DEFAULT))
def test_tokens_with_all_weights_on_the_device(name: str, small_checkpoint: Callable[[str], Path]) -> None:
    folder = small_checkpoint(name)
    check(folder, offload="none", resident_blocks=blocks_of(folder))


@pytest.mark.parametrize("name", tiered(ARCHITECTURES, DEFAULT))
def test_tokens_with_all_weights_in_a_store_written_and_found_again(
    name: str, small_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = small_checkpoint(name)
    for _ in range(2):
        check(folder, offload="nvme", nvme_blocks=blocks_of(folder), nvme_paths=(tmp_path,))


@pytest.mark.parametrize("name", tiered(["llama", "deepseek_v3", "gptj"], ("deepseek_v3",)))
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


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_what_text_does_not_go_through_is_neither_read_nor_stored(family: str, tmp_path: Path) -> None:
    build_tiny(family).save_pretrained(tmp_path)
    found = []
    disk: dict[str, Any] = {"offload": "nvme", "nvme_blocks": 4, "nvme_paths": (tmp_path,)}
    for where in ({}, disk):
        engine = stream(tmp_path, **where)
        found.append(tokens_of(engine))
        assert not any("vis" in name for name, _ in engine.model.named_parameters())
        engine.close()
    (header,) = tmp_path.glob("zeroinf-store/*/header.json")
    assert '"model.language_model' in header.read_text()
    assert not re.search(r"\.vis", header.read_text())
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for tokens in found:
        assert tokens == [greedy_by_transformers(model, *pair) for pair in zip(PROMPTS, tokens, strict=True)]


def test_all_resident_leaves_no_weights_in_host_memory_and_moves_none(small_checkpoint: Callable[[str], Path]) -> None:
    folder = small_checkpoint("llama")
    stats = stream(folder, offload="none", resident_blocks=blocks_of(folder)).stats()
    assert (stats.streamed_bytes_per_pass, stats.shared_host_bytes, stats.slot_bytes) == (0, 0, 0)


def test_what_stays_on_the_device_passes_through_the_host_in_no_more_memory_than_is_planned(
    small_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = counted_host_memory(monkeypatch, weights)
    folder = small_checkpoint("llama")
    engine = stream(folder, offload="none", resident_blocks=blocks_of(folder))
    groups, outside, _ = group_tensors(engine.model)
    blocks = max(group.nbytes for group in groups)
    assert len(groups) >= 2
    assert sum(made) == 2 * blocks + max(blocks, outside.nbytes)


@pytest.mark.parametrize("name", ["jamba", "deepseek_v3", "lfm2"])
@pytest.mark.parametrize(("resident", "nvme"), [(1, 1), (0, 2), (2, 0)])
def test_layers_of_several_sizes_take_what_the_plan_says(
    name: str,
    resident: int,
    nvme: int,
    small_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = small_checkpoint(name)
    given: dict[str, Any] = {"offload": "nvme" if nvme else "cpu", "resident_blocks": resident, "nvme_blocks": nvme}
    anatomy = read_anatomy(resolve_model(str(folder)).config, dtype="float32")
    choice = Choice(
        engine="stream", fetch="replicated", batch_size=4, micro_batch_rows=4, prefill_tokens=256, **given
    )  # fmt: skip
    (walk,) = walks(anatomy, choice)
    assert len({block.nbytes for block in anatomy.blocks}) > 1
    on_gpu = stream_gpu_terms(anatomy, choice, workload_of(shape_of(4)), 1, overhead(False))
    on_host = stream_host_terms(anatomy, choice, 1, overhead(False))
    planned = {term.name: term.nbytes for term in (*on_gpu, *on_host)}
    made = counted_host_memory(monkeypatch, weights, read_ahead)
    engine = stream(folder, nvme_paths=(tmp_path,) if nvme else (), **given)
    stats = engine.stats()
    assert stats.slot_bytes == planned["slots"]
    assert stats.shared_host_bytes == planned["weights, page-locked"] == walk.host_bytes
    assert stats.streamed_bytes_per_pass == walk.streamed_bytes
    groups, _, _ = group_tensors(engine.model)
    assert (
        walk.resident_bytes == planned.get("resident layers", 0) == sum(g.nbytes for g in groups) - walk.streamed_bytes
    )
    rings = planned.get("NVMe read ring, page-locked", 0)
    assert rings == (made.pop() if nvme else 0)
    stages = sum(made) - walk.host_bytes  # let go of before there is a ring
    assert stages <= max(rings, rings + planned.get("staging buffers (load only)", 0))
    engine.close()


def test_weights_are_loaded_while_kernels_are_tried(
    small_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    is_loaded, found, keep = threading.Event(), list[bool](), weights.Weights.keep

    def kept(self: weights.Weights, groups: Any) -> Any:
        pieces = keep(self, groups)
        is_loaded.set()
        return pieces

    monkeypatch.setattr(weights.Weights, "keep", kept)
    monkeypatch.setattr(early_trials, "norm_kernel_runs", lambda *_: found.append(is_loaded.wait(60)))
    engine = stream(small_checkpoint("llama"))
    for trying in [thread for thread in threading.enumerate() if thread.name == "zeroinf-trials"]:
        trying.join(60)
    assert found == [True]
    engine.close()


def test_waits_for_the_disk_are_counted(
    small_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = small_checkpoint("llama")
    engine = stream(folder, offload="nvme", nvme_blocks=3, nvme_paths=(tmp_path,))
    before = engine.stats().stalls
    read, slow_once = data_files.DataFiles.read, iter([0.5])  # much longer than a pass, however busy the machine is

    def slow(self: data_files.DataFiles, *more: Any) -> None:
        time.sleep(next(slow_once, 0.0))
        read(self, *more)

    monkeypatch.setattr(data_files.DataFiles, "read", slow)
    tokens_of(engine)
    assert (engine.stats().stalls - before).disk_s > 0
    engine.close()


def test_loading_says_how_far_it_is_and_reaches_all_of_it(
    small_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    told: list[tuple[int, int]] = []

    class Ear(SilentListener):
        def filled(self, done_bytes: int, total_bytes: int) -> None:
            told.append((done_bytes, total_bytes))

    engine = stream(small_checkpoint("llama"), told=Ear())
    weights_bytes = sum(p.numel() * p.element_size() for p in engine.model.parameters())
    done, total = told[-1]
    assert [d for d, _ in told] == sorted(d for d, _ in told)
    assert weights_bytes <= done <= total


def test_resident_blocks_do_not_stream(small_checkpoint: Callable[[str], Path]) -> None:
    folder = small_checkpoint("llama")
    streamed = [stream(folder, resident_blocks=n).stats().streamed_bytes_per_pass for n in range(4)]
    assert streamed[0] % 3 == streamed[3] == 0
    assert [streamed[0] - s for s in streamed] == [n * streamed[0] // 3 for n in range(4)]
