"""Small checkpoints whose weights are quantized already, as the libraries that make such checkpoints leave them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from small_models import build_model, build_tokenizer

# Schemes of compressed-tensors: what its weights become, and what becomes of what they are multiplied with.
_PACKED = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
_FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
_ROWS = {"symmetric": True, "strategy": "token", "dynamic": True}
SCHEMES: dict[str, dict[str, Any]] = {
    "w4a16": {"weights": _PACKED},
    "w4a16_channel": {"weights": {**_PACKED, "strategy": "channel", "group_size": None}},
    "w4a16_asym": {"weights": {**_PACKED, "symmetric": False}},
    "w8a16": {"weights": _INT8},
    "w8a8": {"weights": _INT8, "input_activations": {**_ROWS, "num_bits": 8, "type": "int"}},
    "fp8_dynamic": {"weights": _FP8, "input_activations": {**_ROWS, "num_bits": 8, "type": "float"}},
    "fp8_block": {
        "weights": {**_FP8, "strategy": "block", "block_structure": [32, 32]},
        "input_activations": {
            "num_bits": 8, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": True
        },
    },
}  # fmt: skip


_FORMATS = {"w4a16": "pack-quantized", "w8a8": "int-quantized"}
MARKS: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]},
    **{
        scheme: {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": form,
            "config_groups": {"group_0": {"targets": ["Linear"], **SCHEMES[scheme]}},
            "ignore": ["lm_head"],
        }
        for scheme, form in _FORMATS.items()
    },
}
"""What configs of such checkpoints say."""


def compressed_tensors_checkpoint(name: str, scheme: str, folder: Path) -> Path:
    """The small model `name`, every linear layer but the head as `scheme` has it, saved by compressed-tensors."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    model = build_model(name)
    group = {"targets": ["Linear"], **SCHEMES[scheme]}
    config = QuantizationConfig.model_validate({"config_groups": {"group_0": group}, "ignore": ["lm_head"]})
    apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            weights = module.quantization_scheme.weights
            rows, columns = module.weight.shape
            height, width = {"group": (1, 32), "block": (32, 32)}.get(weights.strategy, (1, columns))
            blocks = module.weight.detach().view(rows // height, height, columns // width, width)
            scale, zero = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), weights)
            module.weight_scale.data, module.weight_zero_point.data = scale, zero.to(module.weight_zero_point.dtype)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    build_tokenizer().save_pretrained(folder)
    return folder


def fp8_checkpoint(name: str, folder: Path, dtype: str = "float32") -> Path:
    """The small model `name` as DeepSeek's checkpoints are: linear layers but the head in FP8, a scale a block."""

    block, _ = MARKS["fp8"]["weight_block_size"]

    def quantize(module: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        rows, columns = weight.shape
        blocks = weight.float().view(rows // block, block, columns // block, block)
        scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).view(rows, columns)
        return {f"{module}.weight": codes, f"{module}.weight_scale_inv": scale}

    model = build_model(name, dtype=dtype)
    linear = {n for n, m in model.named_modules() if type(m) is torch.nn.Linear and n != "lm_head"}
    return _rewritten(model, folder, MARKS["fp8"], {f"{n}.weight": (n, quantize) for n in linear})


def fp8_experts_checkpoint(name: str, folder: Path) -> Path:
    """The small model `name` as DeepSeek's checkpoints are, a tensor for each expert: all linear layers but the head
    and routers in FP8."""
    model = build_model(name)
    model.save_pretrained(folder)
    (file,) = folder.glob("*.safetensors")
    block, _ = MARKS["fp8"]["weight_block_size"]
    written: dict[str, torch.Tensor] = {}
    for own, tensor in load_file(file).items():
        if "_proj." not in own:
            written[own] = tensor
            continue
        rows, columns = tensor.shape
        blocks = tensor.view(rows // block, block, columns // block, block)
        scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        written[own] = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).view(rows, columns)
        written[own.replace(".weight", ".weight_scale_inv")] = scale
    save_file(written, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": MARKS["fp8"]}))
    return folder


def mxfp4_checkpoint(folder: Path) -> Path:
    """A small gpt-oss as its makers save it: experts as codes of 4 bits, 32 of which share a power of two."""

    def quantize(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        groups = weight.transpose(1, 2).reshape(weight.shape[0], weight.shape[2], -1, 32)
        powers = (groups.abs().amax(-1) / 6).log2().ceil()
        values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
        scaled = groups / powers.exp2()[..., None]
        codes = (scaled.abs()[..., None] - values).abs().argmin(-1) + 8 * (scaled < 0)
        packed = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        return {f"{name}_blocks": packed, f"{name}_scales": (powers + 127).to(torch.uint8)}

    model = build_model("gpt_oss")
    names = [n for n, _ in model.named_parameters() if n.endswith("_proj") and ".experts." in n]
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    found = {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    return _rewritten(model, folder, found, {n: (n, quantize) for n in names})


def _rewritten(model: Any, folder: Path, mark: dict[str, Any], changed: dict[str, Any]) -> Path:
    """Save `model`, with the tensors that are `changed` by a function of a name and a tensor, and `mark` it so."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for stored, (name, quantize) in changed.items():
        tensors |= quantize(name, tensors.pop(stored))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": mark}))
    build_tokenizer().save_pretrained(folder)
    return folder
