"""Greedy tokens on a GPU are those of plain transformers on the same GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from generating import rows_of, run_rows
from launching import run_zeroinf
from quantized import MARKS, compressed_tensors_checkpoint, fp8_checkpoint, mxfp4_checkpoint
from small_models import PAD, auto_class, make_checkpoint, small_config
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from zeroinf.distributed.control import Control
from zeroinf.distributed.world import World
from zeroinf.engines.stream.engine import StreamEngine
from zeroinf.generation.prompts import decoder_start
from zeroinf.generation.sampling import choose_tokens
from zeroinf.model.inspect import read_anatomy
from zeroinf.model.resolve import resolve_model
from zeroinf.planner.plan import Plan

pytestmark = pytest.mark.gpu

PROMPTS = ([5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15], [16])
NEW_TOKENS = 16
NAMES = ("llama", "llama_tied", "gpt_neox", "opt", "bloom", "mixtral", "gptj", "gemma2", "mamba", "deepseek_v3")


def tokens_of(
    folder: Path, limits: dict[str, int], stream: torch.cuda.Stream | None = None, **where: Any
) -> list[list[int]]:
    """What the stream engine generates on `stream` with weights in host memory, or as `where` says in the plan's
    terms. It is loaded on the default stream."""
    source, device, control = resolve_model(str(folder)), torch.device("cuda", 0), Control(World(), "cuda")
    plan = Plan(
        anatomy=read_anatomy(source.config, dtype="float32"),
        engine="stream",
        dtype="float32",
        device="cuda",
        world_size=1,
        batch_size=len(PROMPTS),
        **{"offload": "cpu", **where},
    )
    engine = StreamEngine(plan, source, control, device)
    rows = rows_of(PROMPTS, NEW_TOKENS, ignore_eos=True)
    if plan.anatomy.encoder is not None:
        for row in rows:
            row.source, row.prompt = row.prompt, [decoder_start(engine.model)]
    try:
        with torch.cuda.stream(stream):
            if stream is not None and engine.link_stream is not None:
                hold_up(engine.link_stream)
            run_rows(engine, rows, **limits)
    finally:
        engine.close()
    return [row.generated for row in rows]


def hold_up(stream: torch.cuda.Stream) -> None:
    """Let nothing cross the link for half a second or so: who does not wait for it computes with other weights."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**9)


def plain_tokens(folder: Path, **how: Any) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval().cuda()
    if how:  # codes are expanded to the checkpoint's dtype
        model = model.float()
    model.generation_config.eos_token_id = None
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS], device="cuda")
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS], device="cuda")
    out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    return out[:, width:].tolist()


def blocks_of(folder: Path) -> int:
    return len(read_anatomy(resolve_model(str(folder)).config).blocks)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("resident", "nvme"), [(0, 0), (0.0, 1.0), (1.0, 0.0), (0.34, 0.34)])
@pytest.mark.parametrize("limits", [{}, {"rows": 2, "micro_batch_rows": 1, "prefill_tokens": 5}])
def test_the_stream_engine_with_blocks_on_any_tier(
    name: str, resident: float, nvme: float, limits: dict[str, int], tmp_path: Path
) -> None:
    folder = make_checkpoint(name, tmp_path / name)
    blocks = blocks_of(folder)
    where: dict[str, Any] = {"offload": "nvme", "nvme_paths": (tmp_path,)} if nvme else {}
    where |= {"resident_blocks": round(resident * blocks), "nvme_blocks": round(nvme * blocks)}
    assert tokens_of(folder, limits, **where) == plain_tokens(folder)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("limits", [{}, {"rows": 2, "micro_batch_rows": 1, "prefill_tokens": 5}])
def test_embeddings_in_host_memory(name: str, limits: dict[str, int], tmp_path: Path) -> None:
    folder = make_checkpoint(name, tmp_path / name)
    assert tokens_of(folder, limits, embeddings="cpu") == plain_tokens(folder)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("limits", [{}, {"rows": 2, "micro_batch_rows": 1, "prefill_tokens": 5}])
@pytest.mark.parametrize("resident", [0, 1])
def test_experts_that_come_in_parts(name: str, limits: dict[str, int], resident: int, tmp_path: Path) -> None:
    folder = make_checkpoint(name, tmp_path / name)
    assert tokens_of(folder, limits, expert_parts=3, resident_blocks=resident) == plain_tokens(folder)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("limits", [{}, {"rows": 2, "micro_batch_rows": 1, "prefill_tokens": 5}])
@pytest.mark.parametrize("tokens", [4, 1000])
@pytest.mark.parametrize("tiers", [{}, {"offload": "nvme", "nvme_blocks": 2, "host_units": 3}], ids=["host", "nvme"])
def test_experts_that_are_brought_as_tokens_are_routed_to_them(
    name: str, limits: dict[str, int], tokens: int, tiers: dict[str, Any], tmp_path: Path
) -> None:
    folder = make_checkpoint(name, tmp_path / name)
    where = {**tiers, "nvme_paths": (tmp_path,) if tiers else (), "expert_parts": 3, "routed_tokens": tokens}
    assert tokens_of(folder, limits, **where) == plain_tokens(folder)


@pytest.mark.parametrize("where", [{}, {"wire": "int8"}, {"resident_blocks": 1, "wire": "int8"}, {"embeddings": "cpu"}])
def test_a_call_under_another_stream_waits_for_weights(
    where: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config("llama")
    config.num_hidden_layers = 8  # more than there are slots: each holds another layer's weights in its turn
    monkeypatch.setattr("small_models.small_config", lambda name: config)
    folder = make_checkpoint("llama", tmp_path / "llama")
    wanted = tokens_of(folder, {}, **where)
    assert tokens_of(folder, {}, torch.cuda.Stream(), **where) == wanted
    assert where or wanted == plain_tokens(folder)


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
@pytest.mark.parametrize("resident", [0, 2])
def test_checkpoints_that_are_quantized_already(method: str, resident: int, tmp_path: Path) -> None:
    if method == "fp8":
        folder, how = fp8_checkpoint("llama", tmp_path / "model"), FineGrainedFP8Config(**MARKS["fp8"], dequantize=True)
    else:
        folder, how = mxfp4_checkpoint(tmp_path / "model"), Mxfp4Config(dequantize=True)
    limits = {"rows": 2, "micro_batch_rows": 1, "prefill_tokens": 5}
    assert tokens_of(folder, limits, resident_blocks=resident) == plain_tokens(folder, quantization_config=how)


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16"])
def test_checkpoints_of_compressed_tensors(scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    folder = compressed_tensors_checkpoint("llama", scheme, tmp_path / "model")
    assert tokens_of(folder, {}) == plain_tokens(folder)


def test_the_zero_engine_agrees_with_the_stream_engine(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path / "llama")
    prompts = [argument for text in ("one", "another prompt", "three") for argument in ("--prompt", text)]
    printed = [
        run_zeroinf(["-m", str(folder), "--engine", engine, "--offload", "cpu", "--max-new-tokens", "12", *prompts])
        for engine in ("stream", "zero")
    ]
    assert [done.code for done in printed] == [0, 0]
    assert printed[0].out.count("out=") == 3
    assert printed[0].out == printed[1].out


def test_pinned_host_memory_is_exactly_the_weights(tmp_path: Path) -> None:
    from zeroinf.engines.stream.host_memory import HostMemory

    memory = HostMemory(5 << 20, Control(World(), "cuda"), pin=True)
    assert memory.bytes.is_pinned()
    assert memory.pinned_bytes == 5 << 20
    memory.close()
    assert memory.pinned_bytes == 0


def test_the_first_of_equal_scores_wins_in_half_precision_as_in_float32() -> None:
    rows = rows_of([[1]] * 64, 1)
    scores = torch.randn(64, 50_000, generator=torch.Generator().manual_seed(1)).clamp(max=2.5).bfloat16().cuda()
    assert choose_tokens(scores, rows, [0] * 64).tolist() == scores.cpu().float().argmax(-1).tolist()


@pytest.mark.parametrize("name", ["bart", "t5"])
@pytest.mark.parametrize(("resident", "nvme"), [(0, 0), (1, 0), (3, 0), (0, 5)])
def test_models_with_an_encoder(name: str, resident: int, nvme: int, tmp_path: Path) -> None:
    folder = make_checkpoint(name, tmp_path / name)
    where: dict[str, Any] = {"offload": "nvme", "nvme_paths": (tmp_path,)} if nvme else {}
    model = auto_class(name).from_pretrained(folder, dtype=torch.float32).eval().cuda()
    model.generation_config.eos_token_id = None
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[*p, *[PAD] * (width - len(p))] for p in PROMPTS], device="cuda")
    mask = torch.tensor([[1] * len(p) + [0] * (width - len(p)) for p in PROMPTS], device="cuda")
    wanted = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=PAD)
    assert tokens_of(folder, {}, resident_blocks=resident, nvme_blocks=nvme, **where) == wanted[:, 1:].tolist()
