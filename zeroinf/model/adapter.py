"""LoRA adapters as PEFT saves them, merged into the weights of their base model while these are read, one matrix at a
time.

A merged weight is `W + scale * (B @ A)`, computed in float32 and rounded once. Anything else in an adapter is refused
by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zeroinf.errors import ModelError

if TYPE_CHECKING:
    import torch

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MARK = "merged_adapter"
"""Key of a config under which it says which layers an adapter changes: their names, and the scale of each."""

_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_HINT = "merge it with peft (`merge_and_unload`, `save_pretrained`), and take that folder"
# Keys by which an adapter is more than pairs of matrices beside linear layers, or is not always applied.
_REFUSED = (
    "use_dora", "fan_in_fan_out", "lora_bias", "modules_to_save", "trainable_token_indices", "use_qalora",
    "loftq_config",
    "layer_replication", "target_parameters", "megatron_config", "alora_invocation_tokens", "arrow_config",
)  # fmt: skip
# Keys that say nothing of what is computed, or something that the tensors say themselves.
_NEEDLESS = {
    "alora_invocation_tokens", "arrow_config", "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layer_replication", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "megatron_config",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "alpha_pattern", "revision", "runtime_config", "target_modules", "target_parameters", "task_type",
    "trainable_token_indices", "use_dora", "use_rslora", "use_qalora", "fan_in_fan_out", "bias",
    "ensure_weight_tying",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter in `folder` for the model `base`, a folder or hub id; `scales` are by the name of a layer."""

    folder: Path
    base: str
    scales: Mapping[str, float]

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS_FILE


def read_adapter(folder: Path) -> Adapter:
    """The adapter in `folder`. Raises ModelError for anything but LoRA of linear layers in safetensors."""
    from safetensors import safe_open

    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise _refused(folder, f"{Path(error.filename or WEIGHTS_FILE).name} is not there") from error
    except Exception as error:  # safetensors has its own, json others
        raise _refused(folder, f"it cannot be read: {error}") from error
    _refuse_more_than_lora(folder, config, shapes)
    scales = {}
    for name, shape in shapes.items():
        if name.endswith(_A):
            layer = name.removeprefix(_PREFIX).removesuffix(_A)
            alpha = _of_pattern(config.get("alpha_pattern") or {}, layer, config.get("lora_alpha", 8))
            rank = shape[0]
            scales[layer] = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    base = config.get("base_model_name_or_path")
    if not base:
        raise _refused(folder, "it does not say which model it belongs to")
    return Adapter(folder, str(base), scales)


def _refuse_more_than_lora(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise _refused(folder, f"its peft_type is {kind}, not LORA")
    if unknown := sorted(key for key in set(config) - _NEEDLESS if config[key]):
        raise _refused(folder, f"what it says of {', '.join(unknown)} is not known")
    asked = [name for name in _REFUSED if config.get(name)]
    how = config.get("init_lora_weights", True)
    if how not in (True, False, "gaussian", "orthogonal"):
        raise _refused(folder, f"its init_lora_weights is {how}, which may have changed the base model's weights")
    if asked or config.get("bias", "none") != "none":
        raise _refused(folder, f"it has {', '.join(asked or ['bias'])}")
    for name in shapes:
        other = name.replace(_A, _B) if name.endswith(_A) else name.replace(_B, _A)
        if not name.startswith(_PREFIX) or not name.endswith((_A, _B)) or other not in shapes:
            raise _refused(folder, f"it holds {name}, which is no pair of matrices of a linear layer")


def _of_pattern(patterns: Mapping[str, Any], layer: str, usual: Any) -> Any:
    import re

    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), usual)


def merge_adapter(model: Any) -> None:
    """Say of the parameters of `model` that the adapter on its config changes that they are merged with it.

    Raises ModelError where it belongs to other layers than the model's, or to quantized ones.
    """
    scales: Mapping[str, float] | None = getattr(model.config, MARK, None)
    if not scales:
        return
    from torch.nn import Linear

    from zeroinf.model.quantized.origins import name_parts
    from zeroinf.model.stored_parts import StoredPart, parts_of, set_parts

    name_parts(model)
    for layer, scale in scales.items():
        try:
            module = model.get_submodule(layer)
        except AttributeError:
            module = None
        weight = getattr(module, "weight", None)
        if type(module) is not Linear or weight is None or not weight.is_floating_point() or weight.itemsize == 1:
            raise ModelError(
                f"an adapter changes {layer}, which is no linear layer of numbers of this {type(model).__name__}",
                hint="adapters of experts that are fused and of quantized models do not run; " + _HINT,
            )
        (stored,) = parts_of(weight) or (None,)
        assert stored is not None
        names = (*stored.names, f"{_PREFIX}{layer}{_A}", f"{_PREFIX}{layer}{_B}")
        set_parts(weight, (StoredPart(names, partial(_merged, stored.make, scale)),))


def _merged(
    make: Callable[..., torch.Tensor], scale: float, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    return make(weight).float() + (b.float() @ a.float()) * scale


def _refused(folder: Path, why: str) -> ModelError:
    return ModelError(f"the adapter in {folder} cannot be merged: {why}", hint=_HINT)
