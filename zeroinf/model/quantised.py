"""Checkpoints that are quantised already: modules hold what the checkpoint holds, and expand it as they run."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from functools import cache, partial
from math import ceil
from typing import Any

import torch
from torch.nn import Linear, Module, Parameter

from zeroinf.errors import EnvironmentProblem, ModelError
from zeroinf.model.anatomy import Quantised
from zeroinf.model.source import quantisation

_Held = Mapping[str, torch.Tensor]
_Expand = Callable[[_Held], Mapping[str, torch.Tensor]]
"""From what a module holds to the parameters that its forward uses."""

# Formats of compressed-tensors in which a weight is codes in the order of its elements, and one scale for some of them.
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
# Values that the codes of MXFP4 stand for, and how many codes share a power of two.
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_FP4_GROUP = 32
# Experts are expanded some at a time, or intermediate values of all of them would take three times what they become.
_ELEMENTS_AT_ONCE = 1 << 28


def hold_quantised(model: Any) -> Quantised | None:
    """Let modules of `model` hold their weights as its checkpoint does, if that is quantised; None where it is not.

    `model` is a skeleton whose parameters are on the meta device. Its modules have an `Expansion` each, to weights in
    the dtype of `model`. Raises ModelError for a format that is not known to run, and
    EnvironmentProblem where the package that runs it is missing.
    """
    found = quantisation(model.config)
    if found is None:
        return None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    _HOLD[found["quant_method"]](model, found)
    return Quantised(method=found["quant_method"], parameters=parameters)


class Expansion:
    """Gives `module` its weights in full: for the time of its own forward, or from `open` until `close`.

    In between it has what its checkpoint holds and nothing more.
    """

    def __init__(self, module: Module, expand: _Expand) -> None:
        """Let `module` run with what `expand` makes of its own parameters."""
        self._own: dict[str, Any] = module._parameters
        self._expand, self._run = expand, module.forward
        self._held: dict[str, Any] | None = None
        module.forward = self._forward

    def open(self) -> None:
        """Expand what the module holds now."""
        held = self._held = dict(self._own)
        self._own.update(self._expand({name: tensor for name, tensor in held.items() if tensor is not None}))

    def close(self) -> None:
        """Let go of the weights, if there are any."""
        if self._held is not None:
            self._own.clear()
            self._own.update(self._held)
            self._held = None

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._held is not None:
            return self._run(*args, **kwargs)
        self.open()
        try:
            return self._run(*args, **kwargs)
        finally:
            self.close()


def expansions(module: Module) -> list[Expansion]:
    """Those of `module` and all modules inside, none where its weights are in full."""
    found = (getattr(inner.forward, "__self__", None) for inner in module.modules())
    return [owner for owner in found if isinstance(owner, Expansion)]


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Parameter:
    return Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


def _hold_compressed_tensors(model: Any, found: dict[str, Any]) -> None:
    """The library names the modules and what they hold; activations are rounded as it rounds them."""
    from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

    for part in ("kv_cache_scheme", "transform_config"):
        if found.get(part):
            raise _refused(model, f"compressed-tensors with a {part}", "it changes more than weights")
    if found.get("quantization_status") != "compressed":
        raise _refused(model, "compressed-tensors that are not compressed", "it has its weights in full")
    try:
        quantizer = AutoHfQuantizer.from_config(AutoQuantizationConfig.from_dict(found), pre_quantized=True)
        quantizer.validate_environment()
    except ImportError as error:
        raise EnvironmentProblem(
            f"the checkpoint of {type(model).__name__} is quantised with compressed-tensors: {error}",
            hint="pip install 'zeroinf[compressed-tensors]'",
        ) from error
    except ValueError as error:
        raise _refused(model, "compressed-tensors", str(error)) from error
    with redirect_stderr(io.StringIO()):  # its progress bars: nothing is computed here
        quantizer.preprocess_model(model)
    quantizer.compressor.remove_decompression_hook(model)  # it would expand the whole model, for good
    for module in list(model.modules()):
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None:
            _check_scheme(model, module, scheme)
            module._parameters.pop("weight_shape", None)  # as the module's own; read on a GPU, it would make this wait
            Expansion(module, partial(_expand_compressed_tensors, scheme.weights, module.in_features))


def _check_scheme(model: Any, module: Module, scheme: Any) -> None:
    kind, weights = getattr(scheme.format, "value", scheme.format), scheme.weights
    if kind not in _FORMATS:
        raise _refused(model, f"compressed-tensors in the format {kind}", f"it runs {', '.join(_FORMATS)}")
    if not isinstance(module, Linear):
        raise _refused(model, f"compressed-tensors of {type(module).__name__}", "only linear layers expand")
    if not weights.symmetric:
        raise _refused(model, "compressed-tensors with zero points", "transformers 5.23 does not load them packed")
    if kind == "pack-quantized" and weights.num_bits not in (4, 8):
        raise _refused(model, f"compressed-tensors of {weights.num_bits} bits", "only 4 and 8 bits expand")


def _expand_compressed_tensors(args: Any, columns: int, held: _Held) -> dict[str, torch.Tensor]:
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    packed = held.get("weight_packed")
    codes = held["weight"] if packed is None else _unpack(packed, args.num_bits, columns)
    return {"weight": dequantize(codes, held["weight_scale"], None, args)}


def _unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Codes (rows, columns; int8) of `packed` (int32), which holds them from its lowest bits on, above zero."""
    codes = packed.view(torch.uint8)
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    return (codes[:, :columns] - (1 << bits - 1)).view(torch.int8)


def _hold_fp8(model: Any, found: dict[str, Any]) -> None:
    """Weights in FP8 and a scale for each square block of them, or one for all. Activations stay as they are."""
    from transformers import FineGrainedFP8Config
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    for part, usual in (("scale_fmt", "float"), ("expert_dtype", "fp8"), ("modules_to_convert", None)):
        if found.get(part, usual) != usual:
            raise _refused(model, f"fp8 with {part} {found[part]}", f"only {part} {usual} expands")
    config = FineGrainedFP8Config(**found)
    kept = HfQuantizer.get_modules_to_not_convert(model, config.modules_to_not_convert, model._keep_in_fp32_modules)
    height, width = config.weight_block_size or (0, 0)
    for name, module in model.named_modules():
        if type(module) is not Linear or not should_convert_module(name, kept):
            continue
        rows, columns = module.weight.shape
        if width and columns % width:
            raise _refused(model, f"fp8 in blocks of {width} columns", f"{name} has {columns}, which they do not fill")
        dtype = module.weight.dtype
        module.weight = _meta((rows, columns), torch.float8_e4m3fn)
        scales = (ceil(rows / height), columns // width) if width else ()
        module.weight_scale_inv = _meta(scales, torch.float32)
        Expansion(module, partial(_expand_fp8, height, dtype))


def _expand_fp8(block_rows: int, dtype: torch.dtype, held: _Held) -> dict[str, torch.Tensor]:
    """Values that `dtype` holds exactly, times float32, rounded once: in place, nothing is written out in float32."""
    weight, scales = held["weight"].to(dtype), held["weight_scale_inv"]
    of_rows = scales.repeat_interleave(block_rows, dim=0)[: weight.shape[0]] if scales.dim() else scales.view(1, 1)
    weight.view(weight.shape[0], of_rows.shape[1], -1).mul_(of_rows[..., None])
    return {"weight": weight}


def _hold_mxfp4(model: Any, found: dict[str, Any]) -> None:
    """Experts of gpt-oss: codes of 4 bits, of which 32 share a power of two, transposed."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.quantizers.quantizers_utils import should_convert_module

    names, kept = ("gate_up_proj", "down_proj"), found.get("modules_to_not_convert")
    for path, module in model.named_modules():
        if not isinstance(module, GptOssExperts) or not should_convert_module(path, kept):
            continue
        dtype = module.down_proj.dtype
        for name in names:
            experts, inputs, outputs = module._parameters.pop(name).shape
            groups = experts, outputs, inputs // _FP4_GROUP
            module.register_parameter(f"{name}_blocks", _meta((*groups, _FP4_GROUP // 2), torch.uint8))
            module.register_parameter(f"{name}_scales", _meta(groups, torch.uint8))
        Expansion(module, partial(_expand_mxfp4, names, dtype))


def _expand_mxfp4(names: tuple[str, ...], dtype: torch.dtype, held: _Held) -> dict[str, torch.Tensor]:
    found = {}
    for name in names:
        blocks, scales = held[f"{name}_blocks"], held[f"{name}_scales"]
        experts, outputs, groups, _ = blocks.shape
        whole = torch.empty(experts, groups * _FP4_GROUP, outputs, dtype=dtype, device=blocks.device)
        at_once = max(1, _ELEMENTS_AT_ONCE // whole[0].numel())
        for first in range(0, experts, at_once):
            some = slice(first, first + at_once)
            whole[some] = _fp4(blocks[some], scales[some], dtype).transpose(1, 2)
        found[name] = whole
    return found


def _fp4(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weights (experts, outputs, inputs) of their codes, two a byte, and the powers of two that groups share."""
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    values = _fp4_values(dtype, blocks.device).index_select(0, codes.view(-1).int()).view(codes.shape)
    return torch.ldexp(values, scales[..., None].int() - 127, out=values).flatten(-2)


@cache
def _fp4_values(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(_FP4_VALUES, dtype=dtype, device=device)


def _refused(model: Any, what: str, why: str) -> ModelError:
    return ModelError(
        f"the checkpoint of {type(model).__name__} is quantised already, as {what}, which does not stream: {why}",
        hint="take the model's unquantised checkpoint, and --wire int8 or int4 to move fewer bytes",
    )


_HOLD: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    "compressed-tensors": _hold_compressed_tensors,
    "fp8": _hold_fp8,
    "mxfp4": _hold_mxfp4,
}
