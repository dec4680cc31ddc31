"""Resolves the name of a model: a folder, a `.gguf` file, a hub id, the demo model, or a name of the catalog."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from zeroinf.compat.models import classifiers, keep_capped_scores
from zeroinf.errors import ModelError, UsageError
from zeroinf.model.adapter import CONFIG_FILE, MARK, Adapter, read_adapter
from zeroinf.model.anatomy import UNTIED
from zeroinf.model.catalog import catalog_close_to, catalog_config, catalog_hub_id, mark_own_head
from zeroinf.model.config import lift_quantization, names_dtype, quantization
from zeroinf.model.demo import DEMO_ALIAS, demo_file
from zeroinf.model.gguf.convert import convert_gguf
from zeroinf.model.gguf.folder import gguf_folder
from zeroinf.model.hub import hub_error, require_at_hand
from zeroinf.model.own_code import own_code_error
from zeroinf.model.quantized.registry import METHODS
from zeroinf.model.source import CheckpointFacts, ModelSource
from zeroinf.model.weights import hub_dtype, local_weight_files, weights_at_hand

_OF_A_CLASS = "its weights are no plain tensors"
_WHY_NOT = {
    "quanto": _OF_A_CLASS,
}


# The hub has had ids without an owner, which still lead to their models; new ones cannot be made.
_HUB_IDS_WITHOUT_OWNER = ("gpt2", "distilgpt2", "openai-gpt", "t5-", "ctrl", "xlnet", "transfo-xl", "xlm", "bert-")


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
    lift_quantization(config)
    _require_generating(location, config)
    _refuse_quantized(name, config)
    keep_capped_scores(config)
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
        facts=facts,
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
            if not names_dtype(config) and facts.dtype is not None:
                _set_dtype(config, facts.dtype)
            return facts
    if not names_dtype(config) and not Path(location).is_dir() and (dtype := hub_dtype(location, revision)):
        _set_dtype(config, dtype)
    return None


def _set_dtype(config: Any, dtype: str) -> None:
    import torch

    config.dtype = getattr(torch, dtype)


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
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        AutoConfig,
        PretrainedConfig,
    )

    try:
        fields, _ = PretrainedConfig.get_config_dict(location, revision=revision)
        native = CONFIG_MAPPING[fields["model_type"]] if fields.get("model_type") in CONFIG_MAPPING else None
        own_code = fields.get("auto_map") or {}
        mappings = (
            MODEL_FOR_CAUSAL_LM_MAPPING,
            MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
            MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        )
        known = any(native in mapping for mapping in mappings)
        if own_code and not trust_remote_code and not known:
            raise own_code_error(location, own_code)
        config = AutoConfig.from_pretrained(location, revision=revision, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise hub_error(location, revision, error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"the config of {location} cannot be read: {error}") from error
    mark_own_head(config, fields)
    return config


def _require_generating(location: str, config: Any) -> None:
    """Refuse what transformers cannot build as a model that generates, and encoders that it would build as decoders."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    )

    from zeroinf.model.inspect import takes_images

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
        is_other = not getattr(config, "is_decoder", True) or not classifiers().isdisjoint(named)
        known = not named or decoder in named or not is_other
    elif takes_images(config):
        known = not named or MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)].__name__ in named
    else:
        known = "AutoModelForCausalLM" in own_code
    if known:
        return
    architecture = ", ".join(getattr(config, "architectures", None) or [type(config).__name__])
    raise ModelError(
        f"{location} is no language model that generates: {architecture}",
        hint="zeroinf runs decoder-only models, and sequence-to-sequence models such as T5",
    )


def _refuse_quantized(name: str, config: Any) -> None:
    """Refuse what is quantized in a way that is not known to stream: read as it lies, it would mean something else."""
    found = quantization(config)
    if found is None or (method := found["quant_method"]) in METHODS:
        return
    why = _WHY_NOT.get(method, f"only {', '.join(METHODS)} do")
    raise ModelError(
        f"the weights of {name} are quantized already, with {method}, which does not stream: {why}",
        hint="take the model's unquantized checkpoint, and --wire int8 or int4 to move fewer bytes",
    )
