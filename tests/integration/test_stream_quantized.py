"""Checkpoints that are quantized already stream as they are, and give plain transformers' greedy tokens."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SharedFolder
from fake_graphs import FakeCapturing
from generating import rows_of, run_rows
from quantized import compressed_tensors_checkpoint, fp8_checkpoint, mxfp4_checkpoint
from ranks import on_ranks
from safetensors.torch import load_file, save_file
from test_stream_tokens import plain_tokens, stream, tokens_of

from zeroinf.compat.models import experts_by
from zeroinf.distributed.control import Control, OtherRankFailedError
from zeroinf.distributed.world import World
from zeroinf.engines.stream import experts
from zeroinf.engines.stream.manage_stores import list_stores
from zeroinf.errors import EnvironmentProblem, ModelError, UsageError
from zeroinf.generation.graphs import Graphs
from zeroinf.generation.row import Sampling
from zeroinf.model.inspect import find_blocks, read_anatomy
from zeroinf.model.quantized.expansion import ExpansionSlot
from zeroinf.model.resolve import resolve_model
from zeroinf.options.options import RunOptions
from zeroinf.planner.memory import pieces, store_bytes
from zeroinf.runs.prepare import prepare, read_job
from zeroinf.runs.runner import run_job

Quantized = Callable[[str, str], Path]
# In bfloat16 where plain transformers (5.17) expands to nothing else.
CASES = [
    *(("llama", method, "float32") for method in ("w4a16", "w4a16_channel", "w8a16", "fp8_block", "fp8")),
    ("opt", "w4a16", "float32"),
    ("opt", "fp8", "bfloat16"),
    ("llama", "w8a8", "bfloat16"),
    ("gpt_oss", "mxfp4", "bfloat16"),
]


@pytest.fixture(scope="session")
def quantized(shared_folder: SharedFolder) -> Quantized:
    """`quantized(architecture, method)`: the folder of a small checkpoint that is quantized so."""

    def get(name: str, method: str) -> Path:
        if method not in ("fp8", "mxfp4"):
            pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")

        def build(folder: Path) -> None:
            if method == "fp8":
                fp8_checkpoint(name, folder, "bfloat16" if name == "opt" else "float32")
            elif method == "mxfp4":
                mxfp4_checkpoint(folder)
            else:
                compressed_tensors_checkpoint(name, method, folder)

        return shared_folder(f"{method}-{name}", build)

    return get


def run(folder: Path, dtype: str = "float32", **where: Any) -> list[list[int]]:
    engine = stream(folder, dtype, **where)
    try:
        return tokens_of(engine, batches=2)
    finally:
        engine.close()


@pytest.mark.parametrize(("name", "method", "dtype"), CASES)
def test_tokens_are_those_of_plain_transformers(name: str, method: str, dtype: str, quantized: Quantized) -> None:
    folder = quantized(name, method)
    assert run(folder, dtype) == plain_tokens(folder, getattr(torch, dtype))


@pytest.mark.parametrize(("name", "method", "dtype"), [("llama", "w4a16", "float32"), ("gpt_oss", "mxfp4", "bfloat16")])
def test_nor_do_they_depend_on_where_weights_rest(
    name: str, method: str, dtype: str, quantized: Quantized, tmp_path: Path
) -> None:
    folder = quantized(name, method)
    expected = plain_tokens(folder, getattr(torch, dtype))
    assert run(folder, dtype, resident_blocks=2) == expected
    nvme = {"offload": "nvme", "nvme_blocks": 2, "resident_blocks": 1, "nvme_paths": (tmp_path,)}
    for _ in range(2):  # the store is written, and found again
        assert run(folder, dtype, **nvme) == expected
    (store,) = list_stores([tmp_path])
    assert store.state == "whole"


def test_two_ranks_that_gather_codes_give_the_same_tokens(quantized: Quantized) -> None:
    folder = quantized("llama", "fp8")

    def rank(control: Control) -> list[list[int]]:
        torch.set_num_threads(1)
        return tokens_of(stream(folder, fetch="partitioned", world_size=2, control=control))

    found, codes = on_ranks(2, rank)
    assert codes == [0, 0]
    assert found == [plain_tokens(folder)] * 2


@pytest.mark.parametrize(("name", "method"), [("llama", "w4a16"), ("llama", "fp8"), ("gpt_oss", "mxfp4")])
def test_the_planned_bytes_are_those_of_the_checkpoint_and_of_what_is_loaded(
    name: str, method: str, quantized: Quantized, tmp_path: Path
) -> None:
    folder = quantized(name, method)
    anatomy = read_anatomy(resolve_model(str(folder)).config, dtype="float32")
    held = load_file(folder / "model.safetensors")
    shapes = [key for key in held if key.endswith("weight_shape")]
    assert anatomy.weight_bytes == sum(t.numel() * t.element_size() for k, t in held.items() if k not in shapes)
    assert {t.name: t.dtype for t in anatomy.tensors() if not t.is_buffer} == {
        key: str(tensor.dtype).removeprefix("torch.") for key, tensor in held.items() if key not in shapes
    }
    assert anatomy.parameters > anatomy.weight_bytes / 4
    stats = stream(folder).stats()
    assert stats.streamed_bytes_per_pass == stats.shared_host_bytes == sum(pieces(anatomy))
    stream(folder, offload="nvme", nvme_blocks=3, nvme_paths=(tmp_path,)).close()
    assert list_stores([tmp_path])[0].disk_bytes >= store_bytes(anatomy)


def test_random_weights_have_the_shapes_of_the_checkpoint(quantized: Quantized) -> None:
    engine = stream(quantized("gpt_oss", "mxfp4"), "bfloat16", random_weights=True)
    experts = engine.model.model.layers[0].mlp.experts
    assert experts.down_proj_blocks.dtype == torch.uint8
    assert len(set(experts.down_proj_blocks.flatten().tolist())) > 1
    inputs = {"input_ids": torch.tensor([[5, 6]]), "use_cache": False}
    assert engine.forward([inputs])[0].logits.isfinite().all()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"wire": "int8"}, "--wire int8 has no effect: the checkpoint is quantized already, with fp8"),
        ({"engine": "zero"}, "the zero engine does not run checkpoints that are quantized already, with fp8"),
        ({"engine": "resident"}, "the resident engine does not run"),
        ({"engine": "tensor-parallel"}, "the tensor-parallel engine does not run checkpoints that are quantized"),
    ],
)
def test_what_has_no_use_for_codes_is_refused_by_name(
    asked: dict[str, Any], message: str, quantized: Quantized
) -> None:
    options = RunOptions(
        model=str(quantized("llama", "fp8")), prompts=("a",), sampling=Sampling(max_new_tokens=2), **asked
    )
    source = resolve_model(options.model)
    reading = read_job(options, source, "cpu")
    two = World(size=2, local_size=2, launched=True)
    for world in (World(), two):
        with pytest.raises(UsageError, match=message):
            prepare(options, source, reading, reading.job.work, world, "cpu")


def test_ranks_that_share_a_quantized_model_are_refused_by_name(
    quantized: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZEROINF_CACHE", str(tmp_path))  # where nothing is known of the model: one rank looks at it
    options = RunOptions(
        model=str(quantized("llama", "w4a16")),
        prompts=("a",),
        sampling=Sampling(max_new_tokens=2),
        engine="tensor-parallel",
    )

    def body(control: Control) -> object:
        return run_job(options, control.world, torch.device("cpu"), io.StringIO(), Deaf())  # type: ignore[arg-type]

    (first, second), _ = on_ranks(2, body)
    assert isinstance(first, UsageError)
    assert "the tensor-parallel engine does not run checkpoints that are quantized already, with" in first.message
    assert isinstance(second, OtherRankFailedError)
    assert second.exit_code == first.exit_code == 2


class Deaf:
    """An observer that hears nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *heard: None


def changed(folder: Path, to: Path, **fields: Any) -> Path:
    """The config in `folder`, alone in `to`, with other `fields` of its quantization."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= fields
    to.mkdir()
    (to / "config.json").write_text(json.dumps(config))
    return to


def _of_bits(bits: int, **fields: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, **fields}
    return {"targets": ["Linear"], "weights": weights}


@pytest.mark.parametrize(
    ("name", "method", "fields", "message"),
    [
        ("llama", "w4a16", {"kv_cache_scheme": {"num_bits": 8}}, "with a kv_cache_scheme"),
        ("llama", "w4a16", {"quantization_status": "frozen"}, "that are not compressed"),
        ("llama", "w4a16", {"config_groups": {"of_3": _of_bits(3)}}, "has codes of 3 bits"),
        ("llama", "fp8", {"expert_dtype": "fp6"}, "fp8 with expert_dtype fp6"),
    ],
)
def test_what_is_not_known_to_run_is_refused_by_name(
    name: str, method: str, fields: dict[str, Any], message: str, quantized: Quantized, tmp_path: Path
) -> None:
    folder = changed(quantized(name, method), tmp_path / "changed", **fields)
    with pytest.raises(ModelError, match=message):
        read_anatomy(resolve_model(str(folder), random_weights=True).config)


def test_a_missing_package_is_named(quantized: Quantized, monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve_model(str(quantized("llama", "w8a8"))).config
    config.bos_token_id = 5  # a config that was read with the package is not read again
    monkeypatch.setattr("transformers.utils.quantization_config.is_compressed_tensors_available", lambda: False)
    with pytest.raises(
        EnvironmentProblem, match=r"quantized with compressed-tensors: compressed-tensors>=0\.15"
    ) as caught:
        read_anatomy(config)
    assert caught.value.hint == "pip install 'zeroinf[compressed-tensors]'"


@pytest.mark.parametrize("where", [{"offload": "none"}, {"offload": "cpu", "resident_blocks": 1}])
def test_like_layers_are_expanded_to_like_addresses(where: dict[str, Any], quantized: Quantized) -> None:
    engine, found = stream(quantized("llama", "fp8"), **where), list[list[int]]()

    def note(layer: Any, *ignored: Any) -> None:
        found.append([module.weight.data_ptr() for module in layer.modules() if isinstance(module, torch.nn.Linear)])

    for layer in engine.model.model.layers:
        layer.register_forward_pre_hook(note)
    tokens_of(engine)
    assert len(found) > len(engine.model.model.layers)  # layers of more than one pass
    assert all(addresses == found[0] for addresses in found)
    assert len(set(found[0])) == len(found[0])


@pytest.mark.parametrize("resident", [0, 2])
@pytest.mark.parametrize(("name", "method"), [("llama", "fp8"), ("gpt_oss", "mxfp4")])
def test_graphs_of_layers_read_what_was_expanded_last(
    name: str, method: str, resident: int, quantized: Quantized
) -> None:
    engine, found = stream(quantized(name, method), resident_blocks=resident), list[list[list[int]]]()
    for most in (100, 0):
        with experts_by(engine.model, "batched_mm"):
            graphs = Graphs(list(find_blocks(engine.model)[1]), FakeCapturing(), (1, 2, 4, 16), most=most, launched=())
            rows = rows_of([[5, 6, 7, 8], [9, 10, 11], [12]], 12, ignore_eos=True)
            run_rows(engine, rows, rows=3, pages=9, prefill_tokens=16, forward_tokens=16)
            graphs.close()
        assert not graphs.refused
        assert not most or graphs.replays > graphs.count > 0
        found.append([row.generated for row in rows])
    engine.close()
    assert found[0] == found[1]


@pytest.mark.parametrize("by_codes", [False, True])
def test_weights_that_rest_as_codes_have_no_room_in_full(
    by_codes: bool, quantized: Quantized, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = list[int]()
    take = ExpansionSlot.__init__

    def noted(slot: ExpansionSlot, nbytes: int, device: torch.device) -> None:
        slots.append(nbytes)
        take(slot, nbytes, device)

    monkeypatch.setattr(ExpansionSlot, "__init__", noted)
    monkeypatch.setattr(experts, "expert_products", lambda *_: by_codes)
    engine = stream(quantized("gpt_oss", "mxfp4"), "bfloat16", random_weights=True)
    layer = engine.model.model.layers[0].mlp.experts
    engine.close()
    whole = 3 * layer.num_experts * layer.hidden_size * layer.intermediate_size * 2
    assert slots == ([] if by_codes else [whole])


def test_an_interrupted_pass_leaves_modules_as_they_were(quantized: Quantized) -> None:
    folder = quantized("llama", "fp8")
    engine = stream(folder, offload="none", resident_blocks=3)  # a block that streams is bound anew anyhow
    expected = plain_tokens(folder)
    calls = []

    def fail(*ignored: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("for once")

    engine.model.model.layers[1].mlp.register_forward_pre_hook(fail)
    assert tokens_of(engine) == expected  # the same rows again, in halves
    assert len(calls) > 3
    held = engine.model.model.layers[1].self_attn.q_proj
    assert held.weight.dtype == torch.float8_e4m3fn


def test_codes_are_never_taken_for_numbers(quantized: Quantized, tmp_path: Path) -> None:
    folder = quantized("llama", "fp8")
    tensors = load_file(folder / "model.safetensors")
    spared = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, spared: tensors[spared].float()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj has scales and no weight"):
        stream(tmp_path)
    del tensors[spared]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj has scales and no weight"):
        stream(tmp_path)
