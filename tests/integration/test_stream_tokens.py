"""The stream engine gives plain transformers' greedy tokens, for every architecture we know how to build."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from generating import greedy_by_transformers, rows_of, run_rows
from small_models import PACKED_MODELS, REPRESENTATIVES, SMALL_MODELS, VOCABULARY, make_checkpoint
from tiers import tiered
from tiny_models import FAMILIES, save_tiny
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from zeroinf.distributed.control import Control
from zeroinf.distributed.world import World
from zeroinf.engines.base import LoadListener
from zeroinf.engines.stream import checkpoint_weights as load_module
from zeroinf.engines.stream.engine import StreamEngine
from zeroinf.engines.stream.host_memory import HostMemory
from zeroinf.model.inspect import read_anatomy
from zeroinf.model.resolve import resolve_model
from zeroinf.planner.plan import Plan

PROMPTS = ([5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15], [16])
NEW_TOKENS = 10
CPU = torch.device("cpu")


def stream(
    folder: Path,
    dtype: str = "float32",
    told: LoadListener | None = None,
    control: Control | None = None,
    random_weights: bool = False,
    **where: Any,
) -> StreamEngine:
    """An engine with its weights in host memory, or as `where` says in the plan's terms."""
    source = resolve_model(str(folder), random_weights=random_weights)
    fields = {"offload": "cpu", "world_size": 1, **where}
    plan = Plan(
        anatomy=read_anatomy(source.config, dtype=dtype),
        engine="stream",
        dtype=dtype,
        device="cpu",
        batch_size=len(PROMPTS),
        **fields,
    )
    return StreamEngine(plan, source, control or Control(World(), "cpu"), CPU, told)


def tokens_of(engine: StreamEngine, batches: int = 1) -> list[list[int]]:
    """What each row of the last of `batches` equal batches generates."""
    rows = rows_of(PROMPTS * batches, NEW_TOKENS, ignore_eos=True)
    run_rows(engine, rows, draw=len(PROMPTS), rows=len(PROMPTS), together=True)
    return [row.generated for row in rows[-len(PROMPTS) :]]


def counted_host_memory(monkeypatch: pytest.MonkeyPatch, *modules: Any) -> list[int]:
    """The bytes of each piece of host memory that `modules` take from now on."""
    made: list[int] = []

    class Counted(HostMemory):
        def __init__(self, nbytes: int, *more: Any, **named: Any) -> None:
            made.append(nbytes)
            super().__init__(nbytes, *more, **named)

    for module in modules:
        monkeypatch.setattr(module, "HostMemory", Counted)
    return made


def plain_tokens(folder: Path, dtype: torch.dtype = torch.float32) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    return out[:, width:].tolist()


# They enter two at a time where there is room for three, in micro-batches of two at the most, their prompts in pieces.
LENGTHS = ((7, 6), (1, 9), (20, 3), (12, 1), (3, 12), (9, 8))
PRESSED = {"draw": 2, "rows": 3, "pages": 5, "micro_batch_rows": 2, "prefill_tokens": 8}
# Packed, they share forwards of five tokens, over whose ends prompts go on.
PACKED = {"draw": 2, "rows": 3, "pages": 5, "prefill_tokens": 8, "forward_tokens": 5}
# The CPU attends for steps of two forwards in turns, of which one is a layer ahead.
IN_TURNS = {**PACKED, "rows": 5, "pages": 2, "host_tokens": 90, "cpu_rows": 5, "cpu_forwards": 2}


@pytest.mark.parametrize("name", tiered(sorted(SMALL_MODELS), REPRESENTATIVES))
def test_greedy_tokens_are_those_of_plain_transformers_whoever_comes_and_goes(name: str, tmp_path: Path) -> None:
    _compare(name, PRESSED, tmp_path)


@pytest.mark.parametrize("name", tiered(PACKED_MODELS, set(REPRESENTATIVES) & set(PACKED_MODELS)))
def test_so_are_those_of_packed_forwards(name: str, tmp_path: Path) -> None:
    _compare(name, PACKED, tmp_path)


@pytest.mark.parametrize("name", tiered([name for name in PACKED_MODELS if "mamba" not in name], ["llama", "gemma2"]))
def test_so_are_those_of_steps_for_which_the_cpu_attends_in_turns(name: str, tmp_path: Path) -> None:
    _compare(name, IN_TURNS, tmp_path)


def _compare(name: str, given: dict[str, int], tmp_path: Path) -> None:
    folder = make_checkpoint(name, tmp_path / name)
    prompts = [
        [3 + (7 * number + 11 * at) % (VOCABULARY - 3) for at in range(n)] for number, (n, _) in enumerate(LENGTHS)
    ]
    rows = rows_of(prompts, [new for _, new in LENGTHS], ignore_eos=True)
    engine = stream(folder)
    try:
        _, scheduler = run_rows(engine, rows, **given)
    finally:
        engine.close()
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert [row.generated for row in rows] == [greedy_by_transformers(plain, row.prompt, row.generated) for row in rows]
    assert [len(row.generated) for row in rows] == [new for _, new in LENGTHS]
    assert engine.stats().passes == scheduler.counts.passes


def test_the_ring_goes_on_over_passes_and_batches(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path / "llama")
    engine = stream(folder)
    assert tokens_of(engine, batches=3) == plain_tokens(folder)
    assert engine.stats().passes == 3 * NEW_TOKENS


def test_bfloat16_tokens_equal_too(small_checkpoint: Callable[[str], Path]) -> None:
    folder = small_checkpoint("llama")
    assert tokens_of(stream(folder, "bfloat16")) == plain_tokens(folder, torch.bfloat16)


@pytest.mark.parametrize("name", ["llama", "bloom", "gpt_neox"])
def test_matrix_products_are_those_of_plain_transformers(name: str, small_checkpoint: Callable[[str], Path]) -> None:
    folder = small_checkpoint(name)
    engine, plain = stream(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]]), "use_cache": False, "logits_to_keep": 1}
    ours = products_of(lambda: engine.forward([prompts]))
    assert ours == products_of(torch.no_grad()(lambda: plain(**prompts)))
    assert any("[2, 64]" in shapes for _, shapes in ours), "the last position of both prompts, at once"


def products_of(work: Callable[[], object]) -> Counter[tuple[str, str]]:
    """How often matrices of which shapes are multiplied."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        work()
    kinds = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
    return Counter((event.name, str(event.input_shapes[:3])) for event in seen.events() if event.name in kinds)


def test_pickled_weights_load_through_transformers(tmp_path: Path) -> None:
    folder = make_checkpoint("gpt_neox", tmp_path / "model")
    expected = plain_tokens(folder)
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert tokens_of(stream(folder)) == expected


@pytest.mark.parametrize("name", ["mixtral", "jamba", "deepseek_v3", "qwen3_next"])
def test_weights_that_transformers_converts_never_lie_in_memory_as_a_whole(
    name: str, small_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = small_checkpoint(name)
    assert read_anatomy(resolve_model(str(folder)).config).loads == "piece by piece"
    expected = plain_tokens(folder)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **named: pytest.fail("it loads all"))
    assert tokens_of(stream(folder)) == expected


@pytest.mark.parametrize("family", ["gemma3n_text", "inkling2_text"])
def test_weights_whose_names_have_other_numbers_than_their_layer_do_not_either(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbered ones outside of layers, and those that transformers moves to the next layer as it renames them."""
    if family not in FAMILIES:
        pytest.skip("this transformers does not have the model")
    folder = save_tiny(family, tmp_path)
    expected = plain_tokens(folder)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **named: pytest.fail("it loads all"))
    assert tokens_of(stream(folder)) == expected


def test_pickled_weights_are_let_go_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint("gpt_neox", tmp_path / "model")
    torch.save(AutoModelForCausalLM.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    alive: list[weakref.ref[torch.UntypedStorage]] = []
    at_each_copy: list[int] = []
    load, copy = AutoModelForCausalLM.from_pretrained, load_module._copy

    def watched(*args: Any, **named: Any) -> Any:
        model, info = load(*args, **named)
        alive.extend(weakref.ref(parameter.untyped_storage()) for parameter in model.parameters())
        return model, info

    def counted(*args: Any) -> None:
        at_each_copy.append(sum(one() is not None for one in alive))
        copy(*args)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    monkeypatch.setattr(load_module, "_copy", counted)
    monkeypatch.setattr(load_module, "_THREADS", 1)
    stream(folder)
    assert at_each_copy[0] == len(alive) == len(at_each_copy)
    assert at_each_copy[-1] == 1


def test_blocks_of_the_host_copy_take_no_more_than_the_weights(small_checkpoint: Callable[[str], Path]) -> None:
    engine = stream(small_checkpoint("llama"))
    weights = sum(p.numel() * p.element_size() for p in engine.model.parameters())
    tensors = sum(1 for _ in engine.model.parameters()) + sum(1 for _ in engine.model.buffers())
    assert engine.stats().shared_host_bytes <= weights + 512 * tensors


def test_threads_that_load_compute_alone_and_leave_others_their_teams(
    small_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, teams, before = load_module._copy, set(), torch.get_num_threads()

    def counted(*arguments: Any) -> None:
        teams.add(torch.get_num_threads())
        copy(*arguments)

    monkeypatch.setattr(load_module, "_copy", counted)
    torch.set_num_threads(3)
    try:
        stream(small_checkpoint("llama"))
        with ThreadPoolExecutor(1) as later:
            found = torch.get_num_threads(), later.submit(torch.get_num_threads).result()
    finally:
        torch.set_num_threads(before)
    assert teams == {1}
    assert found == (3, 3)


def test_weights_of_another_config_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from zeroinf.errors import ModelError

    folder = make_checkpoint("llama", tmp_path / "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"holds model\.norm\.weight as \(63,\), the model has \(64,\)"):
        stream(folder)
