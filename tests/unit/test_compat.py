"""Interfaces that libraries keep to themselves: each works as `zeroinf.compat` says, and is used nowhere else."""

from __future__ import annotations

import ast
import contextlib
import inspect
import queue
from collections.abc import Callable, Iterator
from logging.handlers import QueueHandler
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import small_config
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig

import zeroinf
from zeroinf.compat import (
    allocator,
    chat_templates,
    deepspeed,
    dispatch,
    experts,
    hub,
    loading,
    masks,
    models,
    modules,
    quantizers,
    states,
    stop_strings,
    subclasses,
    warnings,
)
from zeroinf.model.resolve import resolve_model

OURS = Path(zeroinf.__file__).parent
PUBLIC = {"_exit"}
"""Names that begin with an underscore and are documented: `os._exit`."""
BOUND = {"accelerate", "compressed_tensors", "deepspeed", "huggingface_hub", "lm_eval", "torch", "transformers"}
"""Libraries whose undocumented modules change from release to release."""
DOCUMENTED = {
    "deepspeed.utils",
    "huggingface_hub.errors",
    "lm_eval.__main__",
    "lm_eval.api.instance",
    "lm_eval.api.model",
    "lm_eval.api.registry",
    "lm_eval.utils",
    "torch.distributed",
    "torch.nn",
    "torch.nn.functional",
    "torch.overrides",
    "transformers.cache_utils",
    "transformers.modeling_outputs",
}
"""Modules of theirs that documentation tells users to import."""


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


def undocumented(file: Path) -> Iterator[tuple[int, str]]:
    """Modules of BOUND that `file` imports and no documentation names, and what it changes in objects of theirs."""
    imported = set()
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in BOUND:
            imported |= {alias.asname or alias.name for alias in node.names}
            if "." in node.module and node.module not in DOCUMENTED:
                yield node.lineno, node.module
        elif isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.partition(".")[0]
                imported |= {alias.asname or root} if root in BOUND else set()
                if root in BOUND and "." in alias.name and alias.name not in DOCUMENTED:
                    yield node.lineno, alias.name
    for node in nodes:
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            root_node: ast.expr = node
            while isinstance(root_node, ast.Attribute | ast.Subscript):
                root_node = root_node.value
            if isinstance(root_node, ast.Name) and root_node.id in imported:
                yield node.lineno, ast.unparse(node)


def of_self(node: ast.Attribute) -> bool:
    of_super = isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name)
    return (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")) or of_super


@pytest.mark.parametrize("finds", [private_names, undocumented])
def test_interfaces_that_change_are_used_in_compat_alone(finds: Callable[[Path], Iterator[tuple[int, str]]]) -> None:
    files = [file for file in OURS.rglob("*.py") if file.parent.name != "compat"]
    found = {f"{file.relative_to(OURS)}:{line}": name for file in files for line, name in finds(file)}
    assert not found
    assert any(name for file in (OURS / "compat").glob("*.py") for _, name in finds(file)), "it finds them"


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
        torch.distributions.Exponential(one)
    assert dispatch.TO_COPY in seen
    assert dispatch.LOCAL_SCALAR in seen
    assert dispatch.UNSAFE_VIEW in seen
    assert dispatch.IS_ALL_TRUE in seen
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
    moe = AutoModelForCausalLM.from_config(small_config("qwen3_moe"), dtype=torch.float32)
    own = moe.config._experts_implementation
    with models.experts_by(moe, "batched_mm"):
        assert moe.config._experts_implementation == "batched_mm"
    assert moe.config._experts_implementation == own is not None


def test_experts_run_by_a_function_of_ours() -> None:
    made = AutoModelForCausalLM.from_config(small_config("qwen3_moe"), dtype=torch.float32).eval()
    ids, seen = torch.arange(4)[None], []

    def run(module: Any, states: torch.Tensor, numbers: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        seen.append(module)
        assert numbers.shape == weights.shape
        assert experts.gates_halves(module)
        halves = torch.ones(1, 2), torch.full((1, 2), 3.0)
        assert torch.equal(experts.gated(module, torch.cat(halves, -1)), module.act_fn(halves[0]) * halves[1])
        assert not (module.is_transposed or module.has_bias) and module.has_gate
        return experts.run_by_default(module, states, numbers, weights)

    with torch.no_grad():
        expected = made(ids).logits
        experts.replace_default_experts(made, "zeroinf_test", run)
        assert torch.allclose(made(ids).logits, expected, atol=1e-6)
    assert len(seen) == made.config.num_hidden_layers
    experts.replace_default_experts(made, "zeroinf_other", run)
    assert made.config._experts_implementation == "zeroinf_test", "only the default is replaced"


def test_tensors_without_memory() -> None:
    asked = []

    class Wrapped(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asked.append(func)
            with subclasses.as_plain_tensors():
                return func(*args, **(kwargs or {}))

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
            return func(*subclasses.replaced(Wrapped, lambda found: torch.ones(found.shape), args), **(kwargs or {}))

    made = subclasses.make_wrapper(Wrapped, (2, 3), torch.float32, torch.device("cpu"))
    assert type(made) is Wrapped
    assert made.shape == (2, 3)
    assert torch.equal(torch.add(made, 1), torch.full((2, 3), 2.0))
    assert torch.equal(torch.cat([made, torch.zeros(1, 3)]).sum(), torch.tensor(6.0)), "in lists, too"
    assert asked.count(torch.add) == asked.count(torch.cat) == 1


@pytest.mark.parametrize(("name", "method"), [("gemma2", "eager"), ("llama", None)])
def test_scores_with_a_cap_are_not_left_to_sdpa(name: str, method: str | None, tmp_path: Path) -> None:
    small_config(name).save_pretrained(tmp_path)
    config = resolve_model(str(tmp_path), random_weights=True).config
    assert config._attn_implementation == method
    with torch.device("meta"):
        assert AutoModelForCausalLM.from_config(config).config._attn_implementation == (method or "sdpa")


def test_facts_of_a_model(model: Any) -> None:
    assert models.takes_default_cache(model)
    model._keep_in_fp32_modules_strict, model._keep_in_fp32_modules = {"norm"}, None
    assert models.modules_in_float32(model) == ({"norm"}, set())
    assert all(isinstance(pattern, str) for pattern in models.ignored_when_missing(model))


def test_parameters_stay_apart_for_a_while() -> None:
    config = small_config("llama")
    config.tie_word_embeddings = True

    def tied() -> bool:
        made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        return made.lm_head.weight is made.model.embed_tokens.weight

    with models.keeping_untied(("lm_head.weight",)):
        assert not tied()
    assert tied()


def test_skeletons_take_no_memory_and_have_their_buffers() -> None:
    with models.building_skeletons():
        made = AutoModelForCausalLM.from_config(small_config("llama"), dtype=torch.float32)
    assert {parameter.device.type for parameter in made.parameters()} == {"meta"}
    assert all(buffer.any() for buffer in made.buffers()), "rotary frequencies"


def test_facts_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 7}')
    assert models.generation_config_of(str(tmp_path), None).eos_token_id == 7
    assert not models.tokenizer_config(str(tmp_path), None)
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "own.Tokenizer"}}')
    assert models.tokenizer_config(str(tmp_path), None)["auto_map"]
    assert {"LlamaForSequenceClassification", "BertForQuestionAnswering"} < models.classifiers()
    assert "LlamaForCausalLM" not in models.classifiers()


def test_forwards_take_their_cache_by_a_known_name(model: Any) -> None:
    assert set(models.CACHE_ARGUMENTS) & set(inspect.signature(model.forward).parameters)


def test_modules_that_stay_unquantized(model: Any) -> None:
    kept = quantizers.kept_modules(model, ["lm_head"], ["norm"])
    assert {"lm_head", "norm"} <= set(kept)
    assert not quantizers.is_quantized("lm_head", kept)
    assert quantizers.is_quantized("model.layers.0.mlp.up_proj", kept)
    assert quantizers.is_quantized("model.layers.0.mlp.up_proj", None)
    found = [m for m in AutoModelForCausalLM.from_config(small_config("gpt_oss")).modules()
               if isinstance(m, quantizers.gpt_oss_experts())]  # fmt: skip
    assert found[0].gate_up_proj.dim() == found[0].down_proj.dim() == 3


def test_modules_of_compressed_tensors() -> None:
    args = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    group = {
        "targets": ["Linear"],
        "weights": args,
        "input_activations": {**args, "strategy": "token", "dynamic": True},
    }
    found = {"quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
             "config_groups": {"group_0": group}, "ignore": ["lm_head"]}  # fmt: skip
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(small_config("llama"), dtype=torch.float32)
    quantizers.hold_as_compressed_tensors(made, found)
    linear = made.model.layers[0].mlp.up_proj
    assert linear.weight.dtype == torch.int8
    assert linear.quantization_scheme.weights.block_structure is None


def test_chat_templates_get_the_time_that_is_set() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    def year() -> str:
        return str(
            render_jinja_template([[{"role": "user", "content": ""}]], chat_template="{{ strftime_now('%Y') }}")[0][0]
        )

    with chat_templates.clock_at(200_000_000):
        assert year() == "1976"
    assert year() > "2025"


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


def test_deepspeed_s_codes() -> None:
    from deepspeed.inference.quantization.utils import Quantizer

    weight = nn.Parameter(torch.zeros(4, 8, dtype=torch.float16))
    assert not deepspeed.has_codes(weight)
    weight.weight_quantized = True  # type: ignore[attr-defined]
    weight.quantizer = Quantizer({"num_bits": 8, "symmetric": False, "group_dim": 1, "group_size": 8})  # type: ignore[attr-defined]
    assert deepspeed.has_codes(weight)
    held = deepspeed.codes_of(weight, torch.arange(32, dtype=torch.float16).view(4, 8))
    assert held.dtype == weight.dtype
    assert held.nbytes == 32 + 2 * 4 * 2, "a byte a code; a scale and a minimum of two bytes for each group of 8"


def test_deepspeed_s_op_between_cpus_is_off() -> None:
    deepspeed.without_shared_memory_op()
    from deepspeed.ops import __compatible_ops__

    assert __compatible_ops__["deepspeed_shm_comm"] is False


def test_formulas_of_operations() -> None:
    formula = dispatch.flop_registry[torch.ops.aten.mm]
    assert formula(torch.ones(2, 3), torch.ones(3, 5), out_val=torch.ones(2, 5)) == 2 * 2 * 3 * 5


def test_the_hubs_bars_are_switched_off_and_on_again() -> None:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled

    before = are_progress_bars_disabled()
    with hub.without_bars():
        assert are_progress_bars_disabled()
    assert are_progress_bars_disabled() == before


def test_a_recurrent_layer_goes_on_from_states_that_are_kept_elsewhere() -> None:
    given = torch.zeros(2, 3, 4), torch.zeros(2, 5)
    cache = states.StatesOfOneLayer(1, [("conv", 0, given[0]), ("recurrent", 0, given[1])])
    assert cache.has_previous_state(1)
    full = cache.update_conv_state(torch.ones(2, 3, 2), 1)
    assert full.shape == (2, 3, 4 + 2)
    cache.update_recurrent_state(torch.ones(2, 5), 1)
    conv, recurrent = cache.left()
    assert conv[0, 0].tolist() == [0, 0, 1, 1]
    assert recurrent.all()
    own = DynamicCache(config=small_config("falcon_h1")).layers[0]
    assert not states.keeps_states_and_keys(own)
    own.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))
    assert states.keeps_states_and_keys(own)
    assert not list(states.states_in(own))


def test_a_warning_that_is_dropped_on_paper_is_shown_when_the_model_runs() -> None:
    from transformers.utils import logging

    logger, text, shown = logging.get_logger("transformers.models.on_paper"), "slow code runs here", queue.SimpleQueue()
    handler = QueueHandler(shown)
    logger.addHandler(handler)
    try:
        with warnings.without_library_warnings():
            logger.warning_once(text)
            logger.warning("another")
        assert shown.empty()
        logger.warning_once(text)
        logger.warning_once(text)
        assert shown.get_nowait().getMessage() == text
        assert shown.empty()
    finally:
        logger.removeHandler(handler)
