"""Checkpoints of compressed-tensors, whose library names the quantized modules and their tensors."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn import Linear, Module

from zeroinf.compat import quantizers
from zeroinf.compat.modules import own_parameters
from zeroinf.errors import EnvironmentProblem
from zeroinf.model.quantized.expansion import Expansion, Held, refused, whole_weights
from zeroinf.model.quantized.origins import is_fused
from zeroinf.model.quantized.scaled import expand_scaled, hold_scaled

# Formats in which a weight is codes in the order of its elements, and one scale for some of them.
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


def hold_compressed_tensors(model: Any, found: dict[str, Any]) -> None:
    """Let linear layers hold codes and scales; activations are rounded as the library rounds them."""
    for part in ("kv_cache_scheme", "transform_config"):
        if found.get(part):
            raise refused(model, f"compressed-tensors with a {part}", "it changes more than weights")
    if found.get("quantization_status") != "compressed":
        raise refused(model, "compressed-tensors that are not compressed", "it has its weights in full")
    if _is_of_weights(model, found):
        hold_scaled(model, found)
        return
    try:
        quantizers.hold_as_compressed_tensors(model, found)
    except ImportError as error:
        raise EnvironmentProblem(
            f"the checkpoint of {type(model).__name__} is quantized with compressed-tensors: {error}",
            hint="pip install 'zeroinf[compressed-tensors]'",
        ) from error
    except ValueError as error:
        raise refused(model, "compressed-tensors", str(error)) from error
    for module in list(model.modules()):
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None:
            _check_scheme(model, module, scheme)
            own_parameters(module).pop("weight_shape", None)  # read on a GPU, it would make this wait
            Expansion(module, partial(_expand_compressed_tensors, scheme.weights, module.in_features))


def _is_of_weights(model: Any, found: dict[str, Any]) -> bool:
    """Whether weights alone are quantized, or experts are fused, whose activations nothing of the library rounds: then
    its modules are not needed."""
    groups = [group for group in (found.get("config_groups") or {}).values() if isinstance(group, dict)]
    return is_fused(model) or not any(group.get("input_activations") for group in groups)


def _check_scheme(model: Any, module: Module, scheme: Any) -> None:
    kind, weights = getattr(scheme.format, "value", scheme.format), scheme.weights
    if kind not in _FORMATS:
        raise refused(model, f"compressed-tensors in the format {kind}", f"it runs {', '.join(_FORMATS)}")
    if not isinstance(module, Linear):
        raise refused(model, f"compressed-tensors of {type(module).__name__}", "only linear layers expand")
    if not weights.symmetric:
        raise refused(model, "compressed-tensors with zero points", "transformers 5.23 does not load them packed")
    if kind == "pack-quantized" and weights.num_bits not in (4, 8):
        raise refused(model, f"compressed-tensors of {weights.num_bits} bits", "only 4 and 8 bits expand")


def _expand_compressed_tensors(args: Any, columns: int, held: Held) -> dict[str, torch.Tensor]:
    """A product of a code and a scale is exact in float32, so rounding it once gives what the library computes."""
    packed, scales = held.get("weight_packed"), held["weight_scale"]
    codes = held["weight"] if packed is None else packed
    whole = whole_weights((codes.shape[0], columns), scales.dtype, codes.device)
    block = tuple(args.block_structure) if args.block_structure else None
    expand_scaled(
        whole, codes, scales if scales.dim() > 1 else scales[None], order=held.get("weight_g_idx"), block=block
    )
    return {"weight": whole}
