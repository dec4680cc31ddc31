"""Interfaces that libraries keep to themselves: each works as `zeroinf.compat` says, and is used nowhere else."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import small_config
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import zeroinf
from zeroinf.compat import allocator, deepspeed, dispatch, loading, masks, models, modules, stop_strings

OURS = Path(zeroinf.__file__).parent
PUBLIC = {"_exit"}
"""Names that begin with an underscore and are documented: `os._exit`."""


def private_names(file: Path) -> Iterator[tuple[int, str]]:
    """Private names of other objects, and private modules, that `file` uses; what it defines itself is its own."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and of_self(node)}
    own |= {node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    for node in nodes:
        if isinstance(node, ast.Attribute) and not of_self(node):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("zeroinf"):
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr"):
            names = [one.value for one in node.args[1:2] if isinstance(one, ast.Constant)]
        else:
            continue
        for name in names:
            if name.startswith("_") and not name.startswith("__") and name not in own | PUBLIC:
                yield node.lineno, name


def of_self(node: ast.Attribute) -> bool:
    of_super = isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name)
    return (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")) or of_super


def test_private_names_of_others_are_used_in_compat_alone() -> None:
    files = [file for file in OURS.rglob("*.py") if file.parent.name != "compat"]
    found = {f"{file.relative_to(OURS)}:{line}": name for file in files for line, name in private_names(file)}
    assert not found
    assert any(name for file in (OURS / "compat").glob("*.py") for _, name in private_names(file)), "it finds them"


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_config(small_config("llama"), dtype=torch.float32).eval()


def test_tensors_of_a_module() -> None:
    module = nn.BatchNorm1d(2)
    module.register_buffer("computed", torch.zeros(1), persistent=False)
    assert set(modules.own_parameters(module)) == {"weight", "bias"}
    assert {"running_mean", "computed"} < set(modules.own_buffers(module))
    assert modules.unsaved_buffers(module) == {"computed"}
    modules.own_parameters(module)["weight"] = torch.ones(2)  # no Parameter: assigning the attribute would be refused
    assert type(module.weight) is torch.Tensor


def test_operators_of_a_dispatch_mode() -> None:
    seen = []

    class Seeing(dispatch.TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    one = torch.ones(2, 3)
    with Seeing():  # type: ignore[no-untyped-call]
        one.to(torch.float64)
        one.sum().item()
        (one @ one.T).add_(1)
        one[None] @ one.T
    assert dispatch.TO_COPY in seen
    assert dispatch.LOCAL_SCALAR in seen
    assert dispatch.UNSAFE_VIEW in seen
    assert torch.ops.aten.add_ in map(dispatch.operator_of, seen)
    mutable = {dispatch.operator_of(func) for func in seen if dispatch.schema_of(func).is_mutable}
    assert mutable == {torch.ops.aten.add_}
    assert dispatch.SAFE_SOFTMAX(one, 1).shape == one.shape
    assert dispatch.GROUPED_MM.default is not None
    assert dispatch.storage_id(one) == dispatch.storage_id(one[1:]) != dispatch.storage_id(one.clone())


@pytest.mark.parametrize(
    ("environ", "settings"),
    [
        ({}, "expandable_segments:False"),
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, "expandable_segments:False"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:200"}, "max_split_size_mb:200,expandable_segments:False"),
        (
            {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:200"},
            "expandable_segments:True",
        ),
    ],
)
def test_the_allocator_is_set_back_to_what_the_environment_says_of_it(environ: dict[str, str], settings: str) -> None:
    assert allocator.environment_settings(environ) == settings


def test_the_allocator_takes_settings() -> None:
    allocator.set_allocator("expandable_segments:True")
    with pytest.raises(TypeError):
        allocator.set_allocator(1)  # type: ignore[arg-type]


def test_attention_and_experts_are_changed_for_a_while(model: Any) -> None:
    before = model.config._attn_implementation
    with models.attention_by(model, "eager"):
        assert model.model.layers[0].self_attn.config._attn_implementation == "eager"
    assert model.config._attn_implementation == before
    experts = AutoModelForCausalLM.from_config(small_config("qwen3_moe"), dtype=torch.float32)
    own = experts.config._experts_implementation
    with models.experts_by(experts, "batched_mm"):
        assert experts.config._experts_implementation == "batched_mm"
    assert experts.config._experts_implementation == own is not None


def test_facts_of_a_model(model: Any) -> None:
    assert models.takes_default_cache(model)
    model._keep_in_fp32_modules_strict, model._keep_in_fp32_modules = {"norm"}, None
    assert models.modules_in_float32(model) == ({"norm"}, set())
    assert all(isinstance(pattern, str) for pattern in models.ignored_when_missing(model))


def test_processors_of_greedy_search(model: Any) -> None:
    config = GenerationConfig(repetition_penalty=2.0, min_new_tokens=2)
    found = models.greedy_processors(model, config, prompt_tokens=1, eos_tokens=[2], device=torch.device("cpu"))
    scores = found(torch.tensor([[5]]), torch.ones(1, 8))
    assert scores[0, 5] == 0.5, "the repetition penalty"
    assert scores[0, 2] == float("-inf"), "no end before two new tokens"


def test_conversions_of_a_checkpoint(model: Any) -> None:
    moe = AutoModelForCausalLM.from_config(small_config("mixtral"), dtype=torch.float32)
    whole = dict(moe.state_dict())
    stored = loading.as_in_checkpoint(moe, whole)
    assert set(stored) != set(whole), "experts are apart in checkpoints"
    mapping = loading.conversions(moe, of_old_names=False)
    names = {loading.converted_name(name, mapping, moe.base_model_prefix, whole)[0] for name in stored}
    assert names == set(whole)
    for value in moe.parameters():
        value.data.zero_()
    account = loading.convert_and_load(moe, {name: value.clone() for name, value in stored.items()})
    models.leave_out_ignored(moe, account)
    assert not (account.missing_keys or account.unexpected_keys or account.mismatched_keys or account.conversion_errors)
    assert any(value.any() for value in moe.parameters())
    on_meta = {name: value.to("meta") for name, value in stored.items() if "experts.0." not in name}
    assert loading.convert_and_load(moe.to("meta"), on_meta, on_meta=True).mismatched_keys, "an expert is missing"


def test_masks_are_made_without_looking_at_padding(model: Any) -> None:
    ids = torch.ones(1, 4, dtype=torch.long)
    with masks.padding_is_known(), torch.no_grad():
        known = model(ids, attention_mask=torch.ones_like(ids))
    with torch.no_grad():
        plain = model(ids, attention_mask=torch.ones_like(ids))
    assert torch.allclose(known.logits, plain.logits, atol=1e-5)


def test_stop_strings_know_the_bytes_of_tokens(small_checkpoint: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small_checkpoint("llama"))
    bytes_of = stop_strings.token_bytes(tokenizer)
    for text in ("a", "the", " "):
        names = tokenizer.convert_ids_to_tokens(tokenizer(f"x{text}", add_special_tokens=False)["input_ids"])
        assert b"".join(bytes_of(name) or b"" for name in names).endswith(text.encode())


def test_deepspeed_s_switches() -> None:
    assert not deepspeed.builds_partitions()
    held = deepspeed.partition_models({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    try:
        assert deepspeed.builds_partitions()
    finally:
        deepspeed.build_whole_models()
    assert not deepspeed.builds_partitions()
    del held
    from deepspeed.inference.engine import InferenceEngine

    before = InferenceEngine.inference_mp_group
    with contextlib.ExitStack() as stack:
        stack.callback(deepspeed.run_tensor_parallel_in, before)
        deepspeed.run_tensor_parallel_in("group")
        assert InferenceEngine.inference_mp_group == "group"


def test_deepspeed_s_fused_weights() -> None:
    block = nn.Module()
    assert deepspeed.fused_rows("model.layers.0.mlp.up_proj.weight", (8, 4), 2, block, small_config("llama")) == (8,)
    codes = torch.zeros(4, dtype=torch.uint8), torch.ones(2), torch.zeros(2)
    assert deepspeed.as_one_tensor(codes).numel() == 8
