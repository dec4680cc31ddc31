"""Gives access to what transformers keeps to itself in models and their configs.

Relies on attributes of `PreTrainedModel`, `PreTrainedConfig` and `GenerationMixin`, and on modules that transformers
does not document, as they are in transformers 5.17 to 5.24; each function names its own. `tests/unit/test_compat.py`
fails when they change.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params")
"""What forwards call their cache, and the outputs that return it: the first since transformers 5.24, the last that of
state-space models before."""


@contextmanager
def attention_by(model: Any, name: str) -> Iterator[None]:
    """While it lasts, layers of `model` hand attention to what is registered with transformers as `name`.

    Relies on `config._attn_implementation`, which layers read in each forward; `set_attn_implementation` does more than
    that, and takes a hundred times as long.
    """
    config = model.config
    before, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = before


def keep_capped_scores(config: Any) -> None:
    """Let layers of `config` compute attention by transformers' eager method where the model caps its scores.

    Relies on `config._attn_implementation`, from which models take their method when they are built, and on the name of
    the cap. Models that have one (Gemma-2, VaultGemma, T5Gemma) do so by themselves since transformers 5.21; until
    then they take sdpa, which leaves the cap out and gives other tokens.
    """
    if getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None:
        config._attn_implementation = "eager"


@contextmanager
def experts_by(model: Any, name: str) -> Iterator[None]:
    """While it lasts, experts of `model` run by transformers' method `name`; nothing where it has no such choice.

    Relies on `config._experts_implementation`, the only way to learn what is set.
    """
    before = getattr(model.config, "_experts_implementation", None)
    if before is None:
        yield
        return
    model.set_experts_implementation(name)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def is_experts(module: Any) -> bool:
    """Whether `module` computes all experts of a layer by transformers' interface for them.

    Relies on the attributes that its decorator `use_experts_implementation` sets, and on `num_experts`.
    """
    return all(hasattr(module, name) for name in ("has_gate", "is_transposed", "num_experts", "_apply_gate"))


def experts_method(module: Any) -> str:
    """The method by which the experts `module` computes, "eager" for the one of its class. Relies on
    `config._experts_implementation`."""
    return str(module.config._experts_implementation)


@contextmanager
def computing_some_experts(module: Any, count: int) -> Iterator[int]:
    """While it lasts, the experts `module` takes itself to have `count` experts; gives the number by which a token is
    routed to none of them.

    Relies on `num_experts`, on the number behind the last expert's, which ranks of transformers' expert parallelism
    leave to others, and on the attribute `_is_expert_parallel` (since transformers 5.18 or so) that says that there are
    such. What the module returns of them has no meaning. The method of the class itself does not know them everywhere.
    """
    before, flag = module.num_experts, getattr(module, "_is_expert_parallel", None)
    module.num_experts = count
    if flag is not None:
        module._is_expert_parallel = True
    try:
        yield 0 if experts_method(module) == "eager" else count
    finally:
        module.num_experts = before
        if flag is not None:
            module._is_expert_parallel = flag


def takes_default_cache(model: Any) -> bool:
    """Whether the model's forward takes a `DynamicCache`. Relies on `_supports_default_dynamic_cache`."""
    return bool(model._supports_default_dynamic_cache())


def modules_in_float32(model: Any) -> tuple[set[str], set[str]]:
    """Modules that stay float32 when a model is loaded in a smaller dtype, and those that do in float16 only.

    Relies on `_keep_in_fp32_modules_strict` and `_keep_in_fp32_modules`, which loading reads.
    """
    return set(model._keep_in_fp32_modules_strict or ()), set(model._keep_in_fp32_modules or ())


def ignored_when_missing(model: Any) -> tuple[str, ...]:
    """Patterns of tensors that the model computes by itself where a checkpoint lacks them. Relies on
    `_keys_to_ignore_on_load_missing`."""
    return tuple(model._keys_to_ignore_on_load_missing or ())


def leave_out_ignored(model: Any, account: Any) -> None:
    """Take out of transformers' account of loading what it would not warn of. Relies on
    `_adjust_missing_and_unexpected_keys`."""
    model._adjust_missing_and_unexpected_keys(account)


def greedy_processors(
    model: Any, config: Any, *, prompt_tokens: int, eos_tokens: Sequence[int], device: torch.device
) -> Any:
    """The logits processors that greedy search with the generation config `config` would use for a prompt of so many
    tokens, a LogitsProcessorList.

    Relies on `_get_logits_processor`, and on `_eos_token_tensor` of the config, which `generate` sets before it. There
    is no public way to have the processors without `generate`.
    """
    import torch

    config._eos_token_tensor = torch.tensor(sorted(eos_tokens), device=device) if eos_tokens else None
    return model._get_logits_processor(generation_config=config, input_ids_seq_length=prompt_tokens, device=str(device))


@contextmanager
def keeping_untied(names: Container[str]) -> Iterator[None]:
    """While it lasts, models are built and loaded without tying the parameters `names` to others.

    Relies on `PreTrainedModel.get_expanded_tied_weights_keys`, by which every model learns what to tie, and which is
    replaced meanwhile for all models of the process. Without it, weights that a checkpoint stores apart would be lost.
    """
    from transformers import PreTrainedModel

    tied_keys = PreTrainedModel.get_expanded_tied_weights_keys

    def without(model: Any, all_submodels: bool = False) -> dict[str, str]:
        return {name: to for name, to in tied_keys(model, all_submodels).items() if name not in names}

    PreTrainedModel.get_expanded_tied_weights_keys = without
    try:
        yield
    finally:
        PreTrainedModel.get_expanded_tied_weights_keys = tied_keys


@contextmanager
def building_skeletons() -> Iterator[None]:
    """While it lasts, models are built with parameters on the meta device and buffers in memory, and no weights are
    drawn. Relies on `transformers.initialization.no_init_weights`; without it building a large model takes minutes."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with no_init_weights(), init_empty_weights(include_buffers=False):
        yield


def generation_config_of(location: str, revision: str | None) -> Any:
    """The generation config that transformers makes of the model config of a checkpoint that has no other.

    Relies on the keyword `_from_model_config`.
    """
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(
        location, config_file_name="config.json", revision=revision, _from_model_config=True
    )


def classifiers() -> set[str]:
    """Names of the classes whose head scores texts or finds answers in them, as a reward model's does. Relies on the
    tables of `transformers.models.auto.modeling_auto`."""
    from transformers.models.auto import modeling_auto

    kinds = ("SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING")
    named = (getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES").values() for kind in kinds)
    return {one for names in named for entry in names for one in (entry if isinstance(entry, tuple) else (entry,))}


def tokenizer_config(location: str, revision: str | None) -> dict[str, Any]:
    """The fields of a checkpoint's tokenizer_config.json, empty without one. Relies on `get_tokenizer_config`."""
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    found: dict[str, Any] = get_tokenizer_config(location, revision=revision)
    return found
