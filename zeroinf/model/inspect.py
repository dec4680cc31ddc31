"""Reads an `Anatomy` off a model that transformers builds on the meta device: real shapes, no weights, no memory."""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch.nn import Module, ModuleList
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
)

from zeroinf.compat import models
from zeroinf.compat.loading import conversions
from zeroinf.compat.warnings import without_library_warnings
from zeroinf.errors import ModelError
from zeroinf.model.adapter import merge_adapter
from zeroinf.model.anatomy import UNTIED, Anatomy, Block, Encoder, Mixers, Quantized, TensorSpec
from zeroinf.model.cache_layout import LayerCache
from zeroinf.model.config import config_dtype
from zeroinf.model.experts import find_experts
from zeroinf.model.kv import can_be_pooled, read_cache, read_encoded_bytes, turns_keys
from zeroinf.model.mixers import read_mixers
from zeroinf.model.packing import why_padded
from zeroinf.model.quantized.registry import hold_quantized
from zeroinf.model.stored_parts import parts_of
from zeroinf.model.tables import find_tables
from zeroinf.model.unread import find_unread

# The names under which configs keep the longest sequence their positions allow. A model with none of them (ALiBi,
# state space) has no such limit, nor has one whose positions are distances (T5).
_LIMIT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")


# Models whose masks let padding count.
_WITHOUT_PADDING = ("GitForCausalLM", "Kosmos2_5ForConditionalGeneration")
# Parts of multimodal models that text does not go through.
_OTHER_SENSES = re.compile(r"vision|visual|image|img|audio|speech")


def read_anatomy(config: Any, *, dtype: str | None = None, trust_remote_code: bool = False) -> Anatomy:
    """Count the model that `config` (a transformers config) describes, in `dtype` (default: the config's own).

    Takes seconds and no memory, whatever the size; a config that was read before is not read again. Raises ModelError
    when transformers cannot build the model, when no stack of decoder layers is found, when the cache cannot be read,
    or when the checkpoint is quantized in a way that is not known to run; EnvironmentProblem where the package that
    would run it is missing.
    """
    dtype = dtype or config_dtype(config)
    key = _key(config, dtype, trust_remote_code)
    if key not in _read:
        with without_library_warnings():  # of slow code, which nothing runs here
            _read[key], _built[key] = _count(config, dtype, trust_remote_code)
    return _read[key]


_read: dict[tuple[object, ...], Anatomy] = {}
_built: dict[tuple[object, ...], Any] = {}
"""The model that was read last, until it is asked for."""


def _key(config: Any, dtype: str, trust_remote_code: bool) -> tuple[object, ...]:
    return type(config), config.to_json_string(use_diff=False), dtype, trust_remote_code


def _count(config: Any, dtype: str, trust_remote_code: bool) -> tuple[Anatomy, Any]:
    _built.clear()
    model, quantized = _build(config, dtype, trust_remote_code)
    _refuse_counted_padding(model)
    stacks = find_stacks(model)
    text = model.config.get_text_config(decoder=True)
    limit = _context_limit(text)
    blocks, outside, tied = _sort_tensors(model, stacks)
    cache, mixers, padded_because = _states_of(model, config, dtype, limit, stacks)
    anatomy = Anatomy(
        architecture=type(model).__name__,
        dtype=dtype,
        blocks_path=stacks[-1][0],
        blocks=tuple(Block(index=i, tensors=tuple(tensors)) for i, tensors in enumerate(blocks)),
        outside=tuple(outside),
        tied=tuple(tied),
        cache=cache,
        hidden_size=text.hidden_size,
        vocabulary=model.get_input_embeddings().weight.shape[0],
        context_limit=limit,
        loads="piece by piece" if is_converted(model) else "in place",
        encoder=Encoder(blocks=len(stacks[0][1]), bytes_per_token=read_encoded_bytes(model)) if stacks[1:] else None,
        quantized=quantized,
        padded_because=padded_because,
        mixers=mixers,
        tables=find_tables(model),
        experts=find_experts(model, list(stacks[-1][1])),
        unread=find_unread(model, stacks[-1][0]),
    )
    return anatomy, model


def _refuse_counted_padding(model: Any) -> None:
    """Raise ModelError where padding changes what the model computes: it adds embeddings of positions that it counts
    itself."""
    if type(model).__name__ in _WITHOUT_PADDING:
        raise ModelError(
            f"{type(model).__name__} takes no notice of padding, so that a row's tokens would depend on its neighbours",
            hint="it describes images, which zeroinf does not take",
        )
    if model.config.is_encoder_decoder or "position_ids" in inspect.signature(model.forward).parameters:
        return
    names = {type(module).__name__ for module in model.modules()}
    if not turns_keys(model) and any(name.endswith("PositionalEmbedding") for name in names):
        raise ModelError(
            f"{type(model).__name__} counts padding as tokens, so that a row's tokens would depend on its neighbours",
            hint="it is the decoder of a larger model: run that as a whole",
        )


_States = tuple[tuple[LayerCache, ...], Mixers | None, str]


def _states_of(
    model: Any, config: Any, dtype: str, limit: int | None, stacks: Sequence[tuple[str, ModuleList]]
) -> _States:
    """The KV cache of each layer, the modules that keep states by row, and why forwards must be padded. None of it
    depends on how weights are quantized, so it is read once for all ways."""
    apart = ("quantization_config", "dtype")  # what the model computes in is said beside
    unquantized = {name: value for name, value in config.to_dict().items() if name not in apart}
    key = type(config), json.dumps(unquantized, default=str, sort_keys=True), dtype
    if key not in _states:
        _states[key] = _read_states(model, limit, stacks)
    return _states[key]


_states: dict[tuple[object, ...], _States] = {}


def _read_states(model: Any, limit: int | None, stacks: Sequence[tuple[str, ModuleList]]) -> _States:
    cache = read_cache(model, limit, stacks)
    mixers = read_mixers(model, cache)
    if mixers is None:  # the states of a layer stay with its keys and values
        cache = tuple(replace(layer, keys=None, values=None) if layer.states else layer for layer in cache)
    blocks = sum(len(layers) for _, layers in stacks)
    padded_because = why_padded(model, cache, mixers, blocks, limit)
    if padded_because and not can_be_pooled(model, cache):
        cache, mixers = tuple(replace(layer, keys=None, values=None) for layer in cache), None
    return cache, mixers, padded_because


def build_meta(config: Any, dtype: str, trust_remote_code: bool = False) -> Any:
    """The language model of `config` on the meta device, in evaluation mode; `config` itself is not changed.

    Parameters are those of its checkpoint, quantized or with the dtypes that `from_pretrained` would give them; buffers
    keep the ones they are made with. Raises the errors of `read_anatomy`.
    """
    model = _built.pop(_key(config, dtype, trust_remote_code), None)
    return _build(config, dtype, trust_remote_code)[0] if model is None else model


def _build(config: Any, dtype: str, trust_remote_code: bool) -> tuple[Any, Quantized | None]:
    try:
        with torch.device("meta"), keeping_untied(config):
            model = auto_class(config).from_config(
                copy.deepcopy(config), dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
            )
    except (ValueError, TypeError, AttributeError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(f"transformers cannot build a language model of {type(config).__name__}: {error}") from error
    return model.eval(), as_in_checkpoint(model, dtype)


def as_in_checkpoint(model: Any, dtype: str) -> Quantized | None:
    """Give the skeleton `model` the parameters that its checkpoint has, loaded as `dtype`; says how that is quantized.

    Raises the errors of `read_anatomy`.
    """
    keep_in_float32(model, dtype)
    quantized = hold_quantized(model)
    merge_adapter(model)
    if quantized is not None and is_converted(model):
        raise ModelError(
            f"the checkpoint of {type(model).__name__} is quantized already, with {quantized.method}, which does not "
            "stream: transformers renames or fuses this model's weights as it loads them",
            hint="take the model's unquantized checkpoint, and --wire int8 or int4 to move fewer bytes",
        )
    return quantized


def auto_class(config: Any) -> Any:
    """The class of transformers that makes the model of `config`: with an encoder, causal, or causal behind images."""
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    return AutoModelForImageTextToText if takes_images(config) else AutoModelForCausalLM


def takes_images(config: Any) -> bool:
    """Whether `config` is of a model that transformers knows with images alone, and that has a language model in it."""
    kind = type(config)
    if config.is_encoder_decoder or kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    made = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(kind, None)
    has_text = config.get_text_config(decoder=True) is not config
    return made is not None and (has_text or made.__name__.endswith("ForCausalLM"))  # Mistral-4 is in that list alone


def keeping_untied(config: Any) -> AbstractContextManager[None]:
    """While it builds or loads a model of `config`, let transformers not tie the parameters that UNTIED names there."""
    return models.keeping_untied(getattr(config, UNTIED, ()))


def find_stacks(model: Any) -> tuple[tuple[str, ModuleList], ...]:
    """The layers that a forward walks over and their dotted paths: those of the encoder, if any, and of the decoder.

    Raises ModelError where one of them has none.
    """
    if not model.config.is_encoder_decoder:
        return (find_blocks(model),)
    return tuple(_largest_stack(model, part) for part in (model.get_encoder(), model.get_decoder()))


def _largest_stack(model: Any, part: Module) -> tuple[str, ModuleList]:
    own = set(part.modules())
    stacks = [(name, module) for name, module in model.named_modules() if isinstance(module, ModuleList)]
    stacks = [stack for stack in stacks if stack[1] in own]
    if not stacks:
        raise ModelError(f"{type(part).__name__} has no stack of layers that could be streamed")
    return max(stacks, key=_parameters)


def _parameters(stack: tuple[str, ModuleList]) -> int:
    return sum(parameter.numel() for parameter in stack[1].parameters())


def find_blocks(model: Any) -> tuple[str, ModuleList]:
    """The decoder layers of `model` and their dotted path: the ModuleList as long as the config's layer count.

    Of several that are not for images or sound, the one with the most parameters. Where there is none, the one of
    half as many, each of which has attention twice (LongCat). Raises ModelError when there is none of that kind either.
    """
    if model.config.is_encoder_decoder:
        return find_stacks(model)[-1]
    layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, ModuleList)]
    lists = [stack for stack in lists if not _OTHER_SENSES.search(stack[0])]
    stacks = [stack for stack in lists if len(stack[1]) == layers]
    stacks = stacks or [stack for stack in lists if 2 * len(stack[1]) == layers]
    if not stacks:
        raise ModelError(f"{type(model).__name__} has no stack of {layers} decoder layers that could be streamed")
    return max(stacks, key=_parameters)


def is_converted(model: Any) -> bool:
    """Whether transformers renames, splits or fuses weights as it loads a checkpoint of `model`.

    Not where the skeleton says of each parameter what it is made of.
    """
    if all(parts_of(parameter) is not None for parameter in model.parameters()):
        return False
    return bool(conversions(model, of_old_names=False))


def keep_in_float32(model: Any, dtype: str) -> None:
    """Apply transformers' lists of modules that stay float32 when a model is loaded in a smaller dtype."""
    always, in_float16 = models.modules_in_float32(model)
    kept = always if dtype in ("float16", "bfloat16") else set()
    if dtype == "float16":
        kept |= in_float16
    if not kept:
        return
    pattern = re.compile("|".join(rf"((^|\.){name}($|\.))" for name in kept))
    for name, parameter in model.named_parameters():
        if pattern.search(name):
            parameter.data = parameter.data.to(torch.float32)


def home_of(name: str, stacks: Sequence[tuple[str, ModuleList]]) -> int | None:
    """The index, counted over all `stacks`, of the block that the tensor `name` lies in; None outside."""
    first = 0
    for path, layers in stacks:
        if name.startswith(f"{path}."):
            return first + int(name.removeprefix(f"{path}.").partition(".")[0])
        first += len(layers)
    return None


def _sort_tensors(
    model: Module, stacks: Sequence[tuple[str, ModuleList]]
) -> tuple[list[list[TensorSpec]], list[TensorSpec], list[tuple[str, str]]]:
    """Specs of the tensors in each block, of those outside, and the tied pairs (alias, canonical)."""
    inside: list[list[TensorSpec]] = [[] for _, layers in stacks for _ in layers]
    outside: list[TensorSpec] = []
    tied: list[tuple[str, str]] = []
    first_name: dict[int, str] = {}
    named: list[tuple[str, torch.Tensor, bool]] = [
        (n, p, False) for n, p in model.named_parameters(remove_duplicate=False)
    ]
    named += [(n, b, True) for n, b in model.named_buffers(remove_duplicate=False)]
    for name, tensor, is_buffer in named:
        if (canonical := first_name.setdefault(id(tensor), name)) != name:
            if not is_buffer:
                tied.append((name, canonical))
            continue
        spec = TensorSpec(
            name=name, shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."), is_buffer=is_buffer
        )
        home = home_of(name, stacks)
        (outside if home is None else inside[home]).append(spec)
    return inside, outside, tied


def _context_limit(text: Any) -> int | None:
    """The longest sequence of the text config's positions; None where nothing limits it."""
    if getattr(text, "alibi", False) or hasattr(text, "relative_attention_num_buckets"):
        return None
    limits = [getattr(text, name, None) for name in _LIMIT_NAMES]
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)
