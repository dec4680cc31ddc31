"""Resolves the name of a model: a folder, a `.gguf` file, a hub id, the demo model, or a name of the catalog."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zeroinf.errors import ModelError, UsageError
from zeroinf.model.adapter import CONFIG_FILE, MARK, Adapter, read_adapter
from zeroinf.model.anatomy import UNTIED
from zeroinf.model.catalog import catalog_close_to, catalog_config, catalog_hub_id, mark_own_head
from zeroinf.model.demo import DEMO_ALIAS, demo_file
from zeroinf.model.gguf.convert import convert_gguf
from zeroinf.model.gguf.folder import gguf_folder
from zeroinf.model.hub import hub_error, require_at_hand
from zeroinf.model.weights import hub_dtype, local_weight_files, weights_at_hand

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from zeroinf.model.checkpoint import CheckpointFacts

DTYPES = ("bfloat16", "float16", "float32")

QUANTIZED_METHODS = (
    "auto-round", "awq", "bitsandbytes", "compressed-tensors", "fp8", "gguf", "gptq", "modelopt", "mxfp4",
)  # fmt: skip
"""Ways to quantize a checkpoint that stream as they are, by the names that configs give them."""

_OF_A_CLASS = "its weights are no plain tensors"
_WHY_NOT = {
    "quanto": _OF_A_CLASS,
    "torchao": _OF_A_CLASS,
}

# Any one of these makes a folder's tokenizer; without this check transformers makes an empty one up.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")

# The hub has had ids without an owner, which still lead to their models; new ones cannot be made.
_HUB_IDS_WITHOUT_OWNER = ("gpt2", "distilgpt2", "openai-gpt", "t5-", "ctrl", "xlnet", "transfo-xl", "xlm", "bert-")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """A model that was found. `name` is what the user wrote, `location` a local folder or a hub id."""

    name: str
    location: str
    revision: str | None
    trust_remote_code: bool
    random_weights: bool
    config: Any = field(compare=False, repr=False)
    facts: CheckpointFacts | None = field(default=None, compare=False, repr=False)
    """None where its weights are not on this machine yet, or are none."""
    weights: tuple[Path, ...] = ()
    """Files of weights that do not lie in `location`: all parts of a `.gguf` file."""
    adapter: Adapter | None = field(default=None, repr=False)
    """What is merged with the weights of `location`, its base model."""

    @property
    def is_local(self) -> bool:
        return Path(self.location).is_dir()


def resolve_model(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    random_weights: bool = False,
    in_full: bool = False,
    expands_once: bool = False,
) -> ModelSource:
    """Find the model `name` and read its config; no weights are loaded, and none are fetched from the hub.

    `name` is `demo`, a checkpoint folder, a `.gguf` file, a folder with a LoRA adapter, a hub id or, with
    `random_weights`, a name of the catalog.
    `in_full`: a `.gguf` file is converted to weights in full first, for engines that run no others, and adapters are
    refused; `expands_once` does the former alone, where that is quicker. The config takes over what only the weights'
    files say, where they are here: a dtype, and which parameters are not tied.
    Raises ModelError when there is no such model, when its weights are not complete, when it is neither a causal
    language model nor a sequence-to-sequence one, or when it would run code of its own without `trust_remote_code`.
    """
    config = None
    weights: tuple[Path, ...] = ()
    adapter: Adapter | None = None
    if random_weights and not Path(name).exists() and (hub_id := catalog_hub_id(name)):
        location, config = hub_id, catalog_config(name)
    else:
        adapter = _adapter(name, in_full=in_full)
        location, weights = _locate(adapter.base if adapter is not None else name, in_full=in_full or expands_once)
    if revision is not None and (config is not None or Path(location).is_dir()):
        where = "the catalog" if config is not None else "a local folder"
        raise UsageError(f"--revision {revision} has no effect: {name} comes from {where}", hint="drop --revision")
    if config is None:
        config = _read_config(location, revision, trust_remote_code)
    _require_generating(location, config)
    _refuse_quantized(name, config)
    if adapter is not None:
        setattr(config, MARK, dict(adapter.scales))
    facts = _facts(name, config, location, weights, adapter, revision, trust_remote_code, random_weights)
    return ModelSource(
        name=name,
        location=location,
        revision=revision,
        trust_remote_code=trust_remote_code,
        random_weights=random_weights,
        config=config,
        facts=None if random_weights else facts,
        weights=weights,
        adapter=adapter,
    )


def _adapter(name: str, *, in_full: bool) -> Adapter | None:
    """The adapter in the folder `name`, if it is one's."""
    folder = Path(name).expanduser()
    if not name or not (folder / CONFIG_FILE).is_file() or (folder / "config.json").is_file():
        return None
    adapter = read_adapter(folder)
    if in_full:
        raise UsageError(
            f"{name} is a LoRA adapter, which is merged by the stream engine, with --wire model, alone",
            hint="--engine stream without --wire, or merge it with peft and take that folder",
        )
    return adapter


def _facts(
    name: str,
    config: Any,
    location: str,
    weights: Sequence[Path],
    adapter: Adapter | None,
    revision: str | None,
    trust_remote_code: bool,
    random_weights: bool,
) -> CheckpointFacts | None:
    """Check the weights of `location` where they are on this machine, and note on `config` what it does not say.

    With `random_weights` only shapes and the dtype are wanted, and damage is none.
    """
    with suppress(ModelError) if random_weights else nullcontext():
        files: Sequence[Path] | None = weights
        if not weights:
            is_here = Path(location).is_dir()
            files = local_weight_files(Path(location)) if is_here else weights_at_hand(location, revision)
        if files is not None and adapter is not None:
            files = [*files, adapter.weights]
        if files is not None:
            from zeroinf.model.checkpoint import read_facts

            facts = read_facts(name, config, files, trust_remote_code=trust_remote_code)
            setattr(config, UNTIED, facts.untied)
            if not _names_dtype(config) and facts.dtype is not None:
                _set_dtype(config, facts.dtype)
            return facts
    if not _names_dtype(config) and not Path(location).is_dir() and (dtype := hub_dtype(location, revision)):
        _set_dtype(config, dtype)
    return None


def _names_dtype(config: Any) -> bool:
    parts = (config, config.get_text_config(decoder=True))
    return any(getattr(part, "dtype", None) is not None for part in parts)


def _set_dtype(config: Any, dtype: str) -> None:
    import torch

    config.dtype = getattr(torch, dtype)


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase | None:
    """The tokenizer of `source`, padding on the left, with a pad token.

    None for random weights that come without a tokenizer in a local folder: callers make up token ids. Raises
    ModelError where a real model has none, or one that would run code of its own without `trust_remote_code`.
    """
    folder = _tokenizer_folder(source)
    has_files = any((folder / file).is_file() for file in _TOKENIZER_FILES)
    if source.random_weights and not has_files:
        return None
    if source.is_local and not has_files and not source.trust_remote_code:
        raise _no_tokenizer(source, f"none of {', '.join(_TOKENIZER_FILES)} is there")
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder) if source.adapter is not None else source.location,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            padding_side="left",
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        own_code = get_tokenizer_config(source.location, revision=source.revision).get("auto_map")
        if own_code and not source.trust_remote_code:
            raise _own_code(source.location, own_code) from error
        raise _no_tokenizer(source, str(error)) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or _any_special_token(tokenizer)
    return tokenizer


def _tokenizer_folder(source: ModelSource) -> Path:
    """Where the tokenizer lies: an adapter may have brought its own."""
    own = source.adapter.folder if source.adapter is not None else None
    if own is not None and any((own / file).is_file() for file in _TOKENIZER_FILES):
        return own
    return Path(source.location)


def pick_dtype(requested: str, source: ModelSource, device: str, supports_bf16: bool = True) -> str:
    """The dtype to run `source` in on `device` ("cuda" or "cpu"); `auto` is the checkpoint's own where that runs.

    Raises UsageError for a dtype that is unknown, or that the device does not compute in.
    """
    from zeroinf.model.inspect import config_dtype

    if requested == "int8":
        raise UsageError(
            "no engine computes in int8: DeepSpeed's init_inference refuses the dtype, and its fused layers, which "
            "alone quantize, need transformers 4",
            hint="use --dtype bfloat16, float16 or float32; --wire int8 moves weights as codes of 8 bits",
        )
    if requested != "auto":
        if requested not in DTYPES:
            raise UsageError(f"unknown dtype {requested!r}", hint=f"one of auto, {', '.join(DTYPES)}")
        if requested == "float16" and device == "cpu":
            raise UsageError("float16 does not run on the CPU", hint="use --dtype bfloat16 or float32")
        if requested == "bfloat16" and not supports_bf16:
            raise UsageError("this device does not compute in bfloat16", hint="use --dtype float16 or float32")
        return requested
    own = config_dtype(source.config)
    if own not in DTYPES:
        own = "bfloat16"
    if own == "float16" and device == "cpu":
        own = "bfloat16"
    if own == "bfloat16" and not supports_bf16:
        return "float32" if device == "cpu" else "float16"
    return own


def check_name(name: str, revision: str | None = None, *, random_weights: bool = False) -> None:
    """Raise ModelError for a name behind which there can be no model, without reading one, or that cannot be had."""
    path = Path(name).expanduser()
    is_known = name == DEMO_ALIAS or (path.suffix == ".gguf" and path.is_file())
    if is_known or (random_weights and not Path(name).exists() and catalog_hub_id(name)):
        return
    _locate_checkpoint(name, path)
    if not path.is_dir():
        require_at_hand(name, revision)


def _locate(name: str, *, in_full: bool) -> tuple[str, tuple[Path, ...]]:
    """The folder or hub id behind `name`, and files of weights that lie elsewhere; names that can only be paths must
    exist."""
    path = demo_file() if name == DEMO_ALIAS else Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        if in_full:
            return str(convert_gguf(path)), ()
        folder, parts = gguf_folder(path)
        return str(folder), parts
    return _locate_checkpoint(name, path), ()


def _locate_checkpoint(name: str, path: Path) -> str:
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{name} holds no config.json", hint="--model wants the folder of a transformers checkpoint"
            )
        return str(path)
    if path.is_file():
        raise ModelError(f"{name} is a file", hint="--model wants a checkpoint folder, a .gguf file or a hub id")
    if name.startswith(("./", "../", "/", "~")) or name.count("/") > 1 or path.suffix == ".gguf" or not name:
        raise ModelError(f"no such folder: {name!r}", hint="check the path; a hub id looks like organisation/model")
    if "/" not in name and (hub_id := catalog_hub_id(name)):
        raise ModelError(f"{name} names a shape in the catalog, not a checkpoint", hint=f"use {hub_id} for its weights")
    if "/" not in name and not name.lower().startswith(_HUB_IDS_WITHOUT_OWNER) and (close := catalog_close_to(name)):
        raise ModelError(
            f"no model {name!r}: the catalog has no such name, and a hub id looks like organisation/model",
            hint=f"close to it: {', '.join(close)}",
        )
    return name


def _read_config(location: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import (
        CONFIG_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        AutoConfig,
        PretrainedConfig,
    )

    try:
        fields, _ = PretrainedConfig.get_config_dict(location, revision=revision)
        native = CONFIG_MAPPING[fields["model_type"]] if fields.get("model_type") in CONFIG_MAPPING else None
        own_code = fields.get("auto_map") or {}
        known = native in MODEL_FOR_CAUSAL_LM_MAPPING or native in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
        if own_code and not trust_remote_code and not known:
            raise _own_code(location, own_code)
        config = AutoConfig.from_pretrained(location, revision=revision, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise hub_error(location, revision, error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"the config of {location} cannot be read: {error}") from error
    mark_own_head(config, fields)
    return config


def _own_code(location: str, named: Mapping[str, Any]) -> ModelError:
    """`named` is an `auto_map`: classes as `module.Class`, or `repository--module.Class`, one or several each."""
    classes = [
        one for value in named.values() for one in (value if isinstance(value, list | tuple) else [value]) if one
    ]
    parts = [one.rpartition("--") for one in classes]
    files = sorted({f"{module.partition('.')[0]}.py" + (f" of {other}" if other else "") for other, _, module in parts})
    return ModelError(
        f"{location} brings its own code, which would run here: {', '.join(files)}",
        hint="read that code, then pass --trust-remote-code",
    )


def _require_generating(location: str, config: Any) -> None:
    """Refuse what transformers cannot build as a model that generates, and encoders that it would build as decoders."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

    own_code = getattr(config, "auto_map", None) or {}
    named = getattr(config, "architectures", None) or []
    if config.is_encoder_decoder:
        generating = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING.get(type(config), None)
        # T5's first checkpoints have an earlier name.
        accepted = {generating.__name__, "T5WithLMHeadModel"} if generating is not None else set()
        known = bool(accepted) and (not named or not accepted.isdisjoint(named))
    elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        # Some encoders (BERT) can be built as decoders: theirs is a checkpoint of another class.
        decoder = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__
        is_other = not getattr(config, "is_decoder", True) or not _classifiers().isdisjoint(named)
        known = not named or decoder in named or not is_other
    else:
        known = "AutoModelForCausalLM" in own_code
    if known:
        return
    architecture = ", ".join(getattr(config, "architectures", None) or [type(config).__name__])
    raise ModelError(
        f"{location} is no language model that generates: {architecture}",
        hint="zeroinf runs decoder-only models, and sequence-to-sequence models such as T5",
    )


def _classifiers() -> set[str]:
    """Names of transformers' classes whose head scores texts or finds answers in them, as a reward model's does."""
    from transformers.models.auto import modeling_auto

    kinds = ("SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING")
    named = (getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES").values() for kind in kinds)
    return {one for names in named for entry in names for one in (entry if isinstance(entry, tuple) else (entry,))}


def quantization(config: Any) -> dict[str, Any] | None:
    """What `config` (a transformers config) says of how its checkpoint is quantized, its method's name under
    `quant_method`; None where it is not."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return None
    found = found if isinstance(found, dict) else found.to_dict()
    method = found.get("quant_method")
    return {**found, "quant_method": str(getattr(method, "value", method))}


def _refuse_quantized(name: str, config: Any) -> None:
    """Refuse what is quantized in a way that is not known to stream: read as it lies, it would mean something else."""
    found = quantization(config)
    if found is None or (method := found["quant_method"]) in QUANTIZED_METHODS:
        return
    why = _WHY_NOT.get(method, f"only {', '.join(QUANTIZED_METHODS)} do")
    raise ModelError(
        f"the weights of {name} are quantized already, with {method}, which does not stream: {why}",
        hint="take the model's unquantized checkpoint, and --wire int8 or int4 to move fewer bytes",
    )


def _no_tokenizer(source: ModelSource, why: str) -> ModelError:
    return ModelError(f"no tokenizer for {source.name}: {why}", hint="put tokenizer.json beside the weights")


def _any_special_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """A token to pad with where there is no end of text: padding is masked, so any one serves."""
    special = tokenizer.all_special_tokens
    return str(special[0] if special else tokenizer.convert_ids_to_tokens(0))
